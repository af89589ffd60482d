// A chain of residual blocks that keep their shape, in training: conv3x3*.h, norm.h.
//
//   h = relu(BatchNorm(conv(x)))
//   y = relu(BatchNorm(conv(h)) + x)      the x of the next block
//
// A view goes through all blocks before the next view begins: what one block writes the next one finds in the
// cache. h is never written: it is made from the first convolution's z wherever it is read.

#include "conv3x3_backward.h"

// Shared with residual_blocks.py. z is [views, ...] or, if it is not kept, room for one view; statistics and the
// gradients of weight and bias are [views, channels], the gradient of the convolution's weight that of all views.
struct Layer {
    const float *conv, *weight, *bias;
    float *running_mean, *running_var;
    bfloat16* z;
    float *mean, *invstd, *scale, *shift;
    float *grad_conv, *grad_weight, *grad_bias;
    double eps, momentum;
};

struct Block {
    Layer first, second;
    bfloat16* y;
    int keeps_y;  // y is [views, ...]; or else room for one view
};

namespace {

Line line_of(const Layer& layer, long v, long channels) {
    const long at = v * channels;
    return {layer.mean + at, layer.invstd + at, layer.scale + at, layer.shift + at};
}

// z of a view, and its line.
template <class In>
Line convolve_layer(const In& in, const Layer& layer, const std::vector<bfloat16>& packed, bfloat16* z, long v,
                    const Shape& s, int threads) {
    const std::vector<float> pivot(layer.running_mean, layer.running_mean + s.outs);
    const Sums sums = convolve(in, packed, z, pivot.data(), s, threads);
    const Norm norm{layer.weight, layer.bias, layer.running_mean, layer.running_var, layer.eps, layer.momentum};
    const Line line = line_of(layer, v, s.outs);
    find_line(norm, sums, pivot.data(), s.images * s.height * s.width, line);
    return line;
}

// A view's tensors of a layer in backward.
struct Seen {
    const Layer& layer;
    const bfloat16* z;
    Line line;
    NormGradients grads;
    Seen(const Layer& layer, long v, const Shape& s)
        : layer(layer),
          z(layer.z + v * s.images * s.out_size()),
          line(line_of(layer, v, s.outs)),
          grads{layer.grad_weight + v * s.outs, layer.grad_bias + v * s.outs} {}
    Gradient<bfloat16> gradient(const bfloat16* grad, const Sums& sums, const Shape& s) const {
        const long rows = s.images * s.height * s.width;
        return find_gradient(grad, z, Mask<bfloat16>{}, sums, layer.weight, line.mean, line.invstd, grads, rows);
    }
};

}  // namespace

extern "C" {

// x and the last y [views, images, height, width, channels]. Without `keep`, every z and the other y are room for
// one view, and y may be the second z.
void residual_blocks_forward(const bfloat16* x, const Block* blocks, long count, int keep, long views, long images,
                             long height, long width, long channels, int threads) {
    const Shape s{images, height, width, channels, channels, 1};
    const long size = s.in_size() * images;
    std::vector<std::vector<bfloat16>> packed;
    for (long b = 0; b < count; ++b)
        for (const Layer* layer : {&blocks[b].first, &blocks[b].second})
            packed.push_back(pack(layer->conv, s, false));
    for (long v = 0; v < views; ++v) {
        const bfloat16* in = x + v * size;
        for (long b = 0; b < count; ++b) {
            const Block& block = blocks[b];
            bfloat16 *z1 = block.first.z + (keep ? v * size : 0), *z2 = block.second.z + (keep ? v * size : 0);
            bfloat16* y = block.y + (block.keeps_y ? v * size : 0);
            const Line first = convolve_layer(Plain<bfloat16>{in}, block.first, packed[2 * b], z1, v, s, threads);
            const Line second =
                convolve_layer(Activated{z1, first}, block.second, packed[2 * b + 1], z2, v, s, threads);
            normalise(z2, in, y, second, size / channels, channels, true, threads);
            in = y;
        }
    }
}

// All z and y as kept by forward. The gradients that are handed on are those behind the ReLU, and come with the sums
// that the BatchNorm before it needs.
void residual_blocks_backward(const bfloat16* grad_y, const bfloat16* x, const Block* blocks, long count,
                              bfloat16* grad_x, long views, long images, long height, long width, long channels,
                              int threads) {
    const Shape s{images, height, width, channels, channels, 1};
    const long size = s.in_size() * images;
    const Buffer turns[2] = {Buffer(new bfloat16[size]), Buffer(new bfloat16[size])};
    const Buffer grad_h(new bfloat16[size]);
    for (long v = 0; v < views; ++v) {
        bfloat16* grad = turns[0].get();  // of the sum that the block's last ReLU takes: of the residual, too
        const Seen last(blocks[count - 1].second, v, s);
        Gradient<bfloat16> gradient =
            sum_gradients(grad_y + v * size, last.z, {blocks[count - 1].y + v * size, nullptr}, grad,
                          last.layer.weight, last.line.mean, last.line.invstd, last.grads, size / channels, channels,
                          threads);
        for (long b = count - 1; b >= 0; --b) {
            const Seen first(blocks[b].first, v, s), second(blocks[b].second, v, s);
            const ToLayerBefore to_first{nullptr, first.z, {nullptr, &first.line}, first.line.mean};
            const Sums sums = convolve_backward(Activated{first.z, first.line}, second.layer.conv, gradient, to_first,
                                                {grad_h.get(), second.layer.grad_conv, v > 0}, s, threads);
            gradient = first.gradient(grad_h.get(), sums, s);
            if (b == 0) {
                convolve_backward(Plain<bfloat16>{x + v * size}, first.layer.conv, gradient, WithResidual{grad},
                                  {grad_x + v * size, first.layer.grad_conv, v > 0}, s, threads);
                break;
            }
            const Seen before(blocks[b - 1].second, v, s);
            const bfloat16* in = blocks[b - 1].y + v * size;
            const ToLayerBefore to_before{grad, before.z, {in, nullptr}, before.line.mean};
            grad = turns[(count - b) % 2].get();
            const Sums sums_before =
                convolve_backward(Plain<bfloat16>{in}, first.layer.conv, gradient, to_before,
                                  {grad, first.layer.grad_conv, v > 0}, s, threads);
            gradient = before.gradient(grad, sums_before, s);
        }
    }
}
}
