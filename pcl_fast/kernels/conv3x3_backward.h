// The backward pass of a 3x3 convolution and the BatchNorm behind it: gradients of input and weight.
//
// The gradient of z is made image by image where the convolutions need it, and never written to memory.

#pragma once

#include "weight_gradient.h"

namespace {

constexpr long PARTS = 16;  // that the images of a view are divided into, whatever the number of threads

// The gradient of the input, on its way to the layer before: `residual`, if not null, is added; cut off by the mask
// of that layer's ReLU; with the sums its BatchNorm needs, `x` being what that normalised and `mean` its mean.
struct ToLayerBefore {
    static constexpr bool SUMS = true;
    const bfloat16 *residual, *x;
    Mask<bfloat16> mask;
    const float* mean;
    Floats result(Floats value, long at, long channel) const {
        if (residual) value += load(residual + at);
        return mask.cut(value, load(x + at), at, channel);
    }
    void add(Floats value, long at, long channel, Floats& a, Floats& b) const {
        a += value;
        b += value * (load(x + at) - load(mean + channel));
    }
    void fetch(long at) const {
        __builtin_prefetch(x + at);
        if (residual) __builtin_prefetch(residual + at);
        if (mask.y) __builtin_prefetch(mask.y + at);
    }
};

// Or to nowhere we know: `residual` is added.
struct WithResidual {
    static constexpr bool SUMS = false;
    const bfloat16* residual;
    Floats result(Floats value, long at, long) const { return value + load(residual + at); }
    void add(Floats, long, long, Floats&, Floats&) const {}
    void fetch(long at) const { __builtin_prefetch(residual + at); }
};

// Where the gradients of a convolution go: of its input (or null); of its weight [out, 3, 3, in], to what is there
// or in its place.
struct ConvGradients {
    bfloat16* in;
    float* weight;
    bool accumulate;
};

// A convolution of kernel 1 and stride 2 beside the other: its weight [out, in], the gradient of its z, and where that
// of its weight goes.
struct Beside {
    const float* weight;
    const Gradient<bfloat16>& gradient;
    float* grad_weight;
};

// What a thread needs for some images: `grad` is room for a padded one.
struct Workplace {
    Pairs pairs;
    Buffer grad;
    std::unique_ptr<BesidePairs> beside;
    Workplace(const Shape& s, const Beside* with)
        : pairs(s),
          grad(padded_image(s.out_height(), s.out_width(), s.outs)),
          beside(with ? new BesidePairs(with->gradient, pairs) : nullptr) {}
};

// Packed weights, of the convolution and the one beside it.
struct Weights {
    std::vector<bfloat16> packed, packed_beside;
};

// Some images: the gradient of the input, and what they add to those of the weights, sums [tap, in, out].
template <class In, class After>
void backward_images(const In& in, const Gradient<bfloat16>& gradient, const Weights& weights, bfloat16* grad_in,
                     const After& after, Sums& sums, float* weight_sums, float* beside_sums, Range images,
                     const Workplace& place) {
    const Pairs& pairs = place.pairs;
    const Shape& s = pairs.s;
    bfloat16* grad = place.grad.get();
    for (long start = images.begin; start < images.end; start += pairs.at_once) {
        const long count = images.end - start < pairs.at_once ? images.end - start : pairs.at_once;
        for (long n = start; n < start + count; ++n) {
            pad(grad, s.out_height(), s.out_width(), s.outs, [&](bfloat16* row, long y) {
                const long from = (n * s.out_height() + y) * pairs.grad_row;
                for (long x = 0; x < s.out_width(); ++x)
                    for (long c = 0; c < s.outs; c += LANES)
                        store(row + x * s.outs + c, gradient.at(from + x * s.outs + c, c));
            });
            pairs.set(n - start, in, n, grad);
            if (place.beside) place.beside->set(n - start, n);
            if (grad_in && s.stride == 1)
                convolve_back(grad, weights.packed.data(), grad_in, n * s.in_size(), s, after, sums.part(n));
            if (grad_in && s.stride == 2)
                spread_back(grad, weights.packed.data(), place.beside ? place.beside->image.get() : nullptr,
                            weights.packed_beside.data(), grad_in + n * s.in_size(), s);
        }
        add_blocks(pairs, weight_sums, count);
        if (place.beside) add_beside(pairs, *place.beside, beside_sums, count);
    }
}

// Sums [part, tap, in, out] to the gradient of a weight [out, tap, in]: in its place, or in addition to it.
void add_parts(const float* partial, float* grad_weight, bool accumulate, long taps, const Shape& s, int threads) {
    const long size = taps * s.stored() * s.outs;
#pragma omp parallel for num_threads(threads)
    for (long row = 0; row < taps * s.ins; ++row) {
        const long tap = row / s.ins, i = row % s.ins;
        for (long group = 0; group < s.outs; group += LANES) {
            Floats sum{};
            for (long part = 0; part < PARTS; ++part)
                sum += load(&partial[part * size + (tap * s.stored() + i) * s.outs + group]);
            for (int o = 0; o < LANES; ++o) {
                float& grad = grad_weight[(group + o) * taps * s.ins + row];
                grad = accumulate ? grad + sum[o] : sum[o];
            }
        }
    }
}

// Both gradients, and the sums that `after` takes of the input's: with stride 1 only. `beside` or null: with stride 2,
// a convolution whose part in the gradient of the input is added to it.
template <class In, class After>
Sums convolve_backward(const In& in, const float* weight, const Gradient<bfloat16>& gradient, const After& after,
                       const ConvGradients& out, const Shape& s, int threads, const Beside* beside = nullptr) {
    Weights weights;
    if (out.in) weights.packed = pack(weight, s, true);
    if (out.in && beside) weights.packed_beside = pack(beside->weight, s, true, 1);
    const long size = TAPS * s.stored() * s.outs, size_beside = beside ? s.ins * s.outs : 0;
    const std::unique_ptr<float[]> partial(new float[PARTS * size]), partial_beside(new float[PARTS * size_beside]);
    Sums sums(s.images, s.ins);
#pragma omp parallel num_threads(threads)
    {
        const Workplace place(s, beside);
#pragma omp for schedule(dynamic, 1)
        for (long part = 0; part < PARTS; ++part) {
            float *sums_of_part = &partial[part * size], *beside_sums = &partial_beside[part * size_beside];
            std::memset(sums_of_part, 0, size * sizeof(float));
            std::memset(beside_sums, 0, size_beside * sizeof(float));
            const Range images{s.images * part / PARTS, s.images * (part + 1) / PARTS};
            backward_images(in, gradient, weights, out.in, after, sums, sums_of_part, beside_sums, images, place);
        }
    }
    add_parts(partial.get(), out.weight, out.accumulate, TAPS, s, threads);
    if (beside) add_parts(partial_beside.get(), beside->grad_weight, out.accumulate, 1, s, threads);
    return sums;
}

}  // namespace
