// A chain of residual blocks of one shape in training: conv3x3*.h, norm.h.
//
//   h = relu(BatchNorm(conv(x)))
//   y = relu(BatchNorm(conv(h)) + x)      the x of the next block
//
// In the first block of a chain, the first convolution may be of stride 2; then x + becomes BatchNorm(conv1x1(x)) +,
// also of stride 2.
//
// A view goes through all blocks before the next view begins: what one block writes the next one finds in the
// cache. h is never written: it is made from the first convolution's z wherever it is read. y is made, and written,
// where the next block reads it first.

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
    Layer first, second, shortcut;
    int strided;  // or else there is no shortcut
    bfloat16* y;
    int keeps_y;  // y is [views, ...]; or else room for one view
};

// Those of x, and of every y.
struct Chain {
    long count, views, images, height, width, channels, ins;
};

namespace {

Line line_of(const Layer& layer, long v, long channels) {
    const long at = v * channels;
    return {layer.mean + at, layer.invstd + at, layer.scale + at, layer.shift + at};
}

// The shape of every convolution but, perhaps, the first one.
Shape shape_of(const Chain& chain) {
    return {chain.images, chain.height, chain.width, chain.channels, chain.channels, 1};
}

// That of a block's first one.
Shape shape_of(const Chain& chain, const Block& block) {
    if (!block.strided) return shape_of(chain);
    return {chain.images, 2 * chain.height, 2 * chain.width, chain.ins, chain.channels, 2};
}

// A layer in forward: its packed weights, and a view's z.
struct Running {
    const Layer& layer;
    std::vector<bfloat16> packed;
    Running(const Layer& layer, const Shape& s, long taps = TAPS)
        : layer(layer), packed(pack(layer.conv, s, false, taps)) {}
    bfloat16* z(long v, bool keep, const Shape& s) const { return layer.z + (keep ? v * s.images * s.out_size() : 0); }
    Line found(const Sums& sums, const std::vector<float>& pivot, long v, const Shape& s) const {
        const Norm norm{layer.weight, layer.bias, layer.running_mean, layer.running_var, layer.eps, layer.momentum};
        const Line line = line_of(layer, v, s.outs);
        find_line(norm, sums, pivot.data(), s.images * s.out_height() * s.out_width(), line);
        return line;
    }
};

// z of a view, and its line; and those of a shortcut, if it is not null.
template <class In>
Line convolve_layer(const In& in, const Running& run, const Running* shortcut, bool keep, long v, const Shape& s,
                    int threads) {
    const std::vector<float> pivot = pivot_near(run.layer.running_mean, s.outs);
    const Pass pass{run.packed, run.z(v, keep, s), pivot.data()};
    if (!shortcut) return run.found(convolve(in, pass, s, threads), pivot, v, s);
    const std::vector<float> shortcut_pivot = pivot_near(shortcut->layer.running_mean, s.outs);
    const Pass beside{shortcut->packed, shortcut->z(v, keep, s), shortcut_pivot.data()};
    Sums sums(s.images, s.outs);
    const Line line = run.found(convolve(in, pass, s, threads, &beside, &sums), pivot, v, s);
    shortcut->found(sums, shortcut_pivot, v, s);
    return line;
}

// y of all images, where nobody reads it yet.
void join(const Joined& joined, const Shape& s, int threads) {
#pragma omp parallel num_threads(threads)
    {
        const Buffer row(new bfloat16[s.width * s.ins]);
#pragma omp for schedule(dynamic, 64)
        for (long y = 0; y < s.images * s.height; ++y) joined.row(row.get(), y * s.width * s.ins, s);
    }
}

// The layers of a block in forward.
struct RunningBlock {
    const Block& block;
    Shape s, first_s;
    Running first, second;
    std::unique_ptr<Running> shortcut;
    RunningBlock(const Chain& chain, const Block& block)
        : block(block),
          s(shape_of(chain)),
          first_s(shape_of(chain, block)),
          first(block.first, first_s),
          second(block.second, s),
          shortcut(block.strided ? new Running(block.shortcut, first_s, 1) : nullptr) {}
    // From what the block reads, `from`, which lies or is made at `x`: what makes its y.
    template <class In>
    Joined run(const In& from, const bfloat16* x, bool keep, long v, int threads) const {
        const Line line = convolve_layer(from, first, shortcut.get(), keep, v, first_s, threads);
        const Activated h{first.z(v, keep, s), line};
        const Line second_line = convolve_layer(h, second, nullptr, keep, v, s, threads);
        bfloat16* y = block.y + (block.keeps_y ? v * s.images * s.out_size() : 0);
        if (!shortcut) return {second.z(v, keep, s), x, y, second_line, Line{}};
        return {second.z(v, keep, s), shortcut->z(v, keep, s), y, second_line, line_of(shortcut->layer, v, s.outs)};
    }
};

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
        const long rows = s.images * s.out_height() * s.out_width();
        return find_gradient(grad, z, Mask<bfloat16>{}, sums, layer.weight, line.mean, line.invstd, grads, rows);
    }
    // The same with the sums taken here, and the gradient behind the mask written to `behind`, if that is not null.
    Gradient<bfloat16> sum(const bfloat16* grad, Mask<bfloat16> mask, bfloat16* behind, const Shape& s,
                           int threads) const {
        const long rows = s.images * s.out_height() * s.out_width();
        return sum_gradients(grad, z, mask, behind, layer.weight, line.mean, line.invstd, grads, rows, s.outs, threads);
    }
};

// The end of backward: the first convolution of the chain, and x. `grad`: the residual's.
void finish(const Block& block, const Gradient<bfloat16>& gradient, const bfloat16* grad, const bfloat16* x,
            bfloat16* grad_x, long v, const Shape& s, int threads) {
    const ConvGradients out{grad_x, block.first.grad_conv, v > 0};
    if (!block.strided) {
        convolve_backward(Plain<bfloat16>{x}, block.first.conv, gradient, WithResidual{grad}, out, s, threads);
        return;
    }
    const Gradient<bfloat16> of_shortcut = Seen(block.shortcut, v, s).sum(grad, {}, nullptr, s, threads);
    const Beside beside{block.shortcut.conv, of_shortcut, block.shortcut.grad_conv};
    convolve_backward(Plain<bfloat16>{x}, block.first.conv, gradient, AsItIs{}, out, s, threads, &beside);
}

}  // namespace

extern "C" {

// x [views, images, height, width, channels], or twice as high and wide, and with `ins` channels, if the first block is
// strided; the last y as the former. Without `keep`, every z and the other y are room for one view, and y may be the
// second z.
void residual_blocks_forward(const bfloat16* x, const Block* blocks, const Chain* chain, int keep, int threads) {
    std::vector<RunningBlock> running;
    for (long b = 0; b < chain->count; ++b) running.emplace_back(*chain, blocks[b]);
    const Shape& s = running[0].first_s;
    for (long v = 0; v < chain->views; ++v) {
        const bfloat16* in = x + v * s.images * s.in_size();
        Joined joined = running[0].run(Plain<bfloat16>{in}, in, keep, v, threads);
        for (long b = 1; b < chain->count; ++b) joined = running[b].run(joined, joined.y, keep, v, threads);
        join(joined, running[0].s, threads);
    }
}

// All z and y as kept by forward. The gradients that are handed on are those behind the ReLU, and come with the sums
// that the BatchNorm before it needs.
void residual_blocks_backward(const bfloat16* grad_y, const bfloat16* x, const Block* blocks, const Chain* chain,
                              bfloat16* grad_x, int threads) {
    const Shape s = shape_of(*chain), first_s = shape_of(*chain, blocks[0]);
    const long size = s.images * s.out_size(), count = chain->count;
    const Buffer turns[2] = {Buffer(new bfloat16[size]), Buffer(new bfloat16[size])};
    const Buffer grad_h(new bfloat16[size]);
    for (long v = 0; v < chain->views; ++v) {
        bfloat16* grad = turns[0].get();  // of the sum that the block's last ReLU takes: of the residual, too
        const Block& last = blocks[count - 1];
        Gradient<bfloat16> gradient =
            Seen(last.second, v, s).sum(grad_y + v * size, {last.y + v * size, nullptr}, grad, s, threads);
        for (long b = count - 1; b >= 0; --b) {
            const Seen first(blocks[b].first, v, s), second(blocks[b].second, v, s);
            const ToLayerBefore to_first{nullptr, first.z, {nullptr, &first.line}, first.line.mean};
            const Sums sums = convolve_backward(Activated{first.z, first.line}, second.layer.conv, gradient, to_first,
                                                {grad_h.get(), second.layer.grad_conv, v > 0}, s, threads);
            gradient = first.gradient(grad_h.get(), sums, s);
            if (b == 0) break;
            const Seen before(blocks[b - 1].second, v, s);
            const bfloat16* in = blocks[b - 1].y + v * size;
            const ToLayerBefore to_before{grad, before.z, {in, nullptr}, before.line.mean};
            grad = turns[(count - b) % 2].get();
            const Sums sums_before =
                convolve_backward(Plain<bfloat16>{in}, first.layer.conv, gradient, to_before,
                                  {grad, first.layer.grad_conv, v > 0}, s, threads);
            gradient = before.gradient(grad, sums_before, s);
        }
        const long at = v * s.images * first_s.in_size();
        finish(blocks[0], gradient, grad, x + at, grad_x + at, v, first_s, threads);
    }
}
}
