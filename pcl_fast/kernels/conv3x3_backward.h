// The backward pass of a 3x3 convolution and the BatchNorm behind it: gradients of input and weight.
//
// The gradient of z is made image by image where the convolutions need it, and never written to memory.

#pragma once

#include "conv3x3.h"

namespace {

constexpr long PIXELS_AT_ONCE = 512;  // of the weight gradient

// Pairs of pixels: out[x, channel] = (in[x, channel], in[x + gap, channel]), for x from 0 to count - 1 by `step`.
inline void pair_pixels(const bfloat16* in, bfloat16* out, long count, long step, long gap, long channels) {
    if (channels < LANES) {
        for (long x = 0; x < count; x += step)
            for (long c = 0; c < channels; ++c) {
                *out++ = in[x * channels + c];
                *out++ = in[(x + gap) * channels + c];
            }
        return;
    }
    for (long x = 0; x < count; x += step)
        for (long c = 0; c < channels; c += LANES, out += 2 * LANES)
            interleave(in + x * channels + c, in + (x + gap) * channels + c, out);
}

// What the gradient of the weight is summed from: some images' inputs and gradients of z, in pairs of pixels.
struct Pairs {
    const Shape& s;
    // Stride 1: the rows of the input, each pixel with the next one. Stride 2: those of the padded input but the
    // last, each pixel with the next but one.
    long first_row, rows, row, grad_row;
    long at_once;  // Small images are taken several at a time, so that the sums seldom leave the registers.
    Buffer padded_row, in, grad;
    explicit Pairs(const Shape& s)
        : s(s),
          first_row(s.stride == 1 ? 1 : 0),
          rows(s.stride == 1 ? s.height : s.height + 1),
          row((s.stride == 1 ? s.width + 1 : s.width) * s.stored() * 2),
          grad_row(s.out_width() * s.outs),
          at_once(s.out_height() * s.out_width() < PIXELS_AT_ONCE
                      ? PIXELS_AT_ONCE / (s.out_height() * s.out_width())
                      : 1),
          padded_row(new bfloat16[(s.width + 2) * s.stored()]()),
          in(new bfloat16[at_once * rows * row]),
          grad(new bfloat16[at_once * (s.out_height() + 2) * grad_row]) {
        for (long k = 0; k < at_once; ++k) {  // a row of zeros above and below
            std::memset((void*)grad_of(k, -1), 0, grad_row * sizeof(bfloat16));
            std::memset((void*)grad_of(k, s.out_height()), 0, grad_row * sizeof(bfloat16));
        }
    }
    bfloat16* grad_of(long k, long y) const { return &grad[(k * (s.out_height() + 2) + y + 1) * grad_row]; }
    // The k-th of those at once: image n, and its padded gradient.
    template <class In>
    void set(long k, const In& input, long n, const bfloat16* padded_grad) const {
        for (long y = 0; y < rows; ++y) {
            bfloat16* out = &in[(k * rows + y) * row];
            const long from = y + first_row - 1;
            if (from < 0) {
                std::memset((void*)out, 0, row * sizeof(bfloat16));
                continue;
            }
            input.row(&padded_row[s.stored()], n * s.in_size() + from * s.width * s.ins, s);
            pair_pixels(padded_row.get(), out, row / (s.stored() * 2), 1, s.stride, s.stored());
        }
        for (long y = 0; y < s.out_height(); ++y)
            pair_pixels(padded_grad + ((y + 1) * (s.out_width() + 2) + 1) * s.outs, grad_of(k, y), s.out_width(), 2,
                        1, s.outs);
    }
};

// Adds some images' share to 16 outs x up to 8 ins x the 3 taps of a column of the kernel: sums [3, 3, ins, outs].
// With stride 1, a pair of inputs is read once for the three rows of gradients it meets.
template <long INS, int STRIDE>
inline void add_block(const Pairs& pairs, long kx, long first, long group, float* sums, long images) {
    constexpr int WIDTH = INS < 8 ? INS : 8;
    const long outs = pairs.s.outs, tap_row = 3 * INS * outs, width = pairs.s.out_width();
    __m512 block[3][WIDTH];
    for (int ky = 0; ky < 3; ++ky)
        for (int i = 0; i < WIDTH; ++i) block[ky][i] = _mm512_loadu_ps(sums + ky * tap_row + i * outs);
    for (long n = 0; n < images; ++n)
        for (long y = 0; y < pairs.s.out_height(); ++y) {
            const bfloat16* in = &pairs.in[(n * pairs.rows + STRIDE * y) * pairs.row + (kx * INS + first) * 2];
            const bfloat16* grad = pairs.grad_of(n, y - 1) + group * 2;
            for (long x = 0; x < width; x += 2, in += 2 * STRIDE * INS * 2, grad += outs * 2) {
                if constexpr (STRIDE == 1) {
                    const __m512bh g[3] = {load_pairs(grad + 2 * pairs.grad_row), load_pairs(grad + pairs.grad_row),
                                           load_pairs(grad)};
#pragma GCC unroll 8
                    for (int i = 0; i < WIDTH; ++i) {
                        const __m512bh pair = broadcast_pair(in + i * 2);
#pragma GCC unroll 3
                        for (int ky = 0; ky < 3; ++ky) block[ky][i] = _mm512_dpbf16_ps(block[ky][i], g[ky], pair);
                    }
                } else {
                    const __m512bh g = load_pairs(grad + pairs.grad_row);
#pragma GCC unroll 3
                    for (int ky = 0; ky < 3; ++ky)
#pragma GCC unroll 8
                        for (int i = 0; i < WIDTH; ++i)
                            block[ky][i] =
                                _mm512_dpbf16_ps(block[ky][i], g, broadcast_pair(in + ky * pairs.row + i * 2));
                }
            }
        }
    for (int ky = 0; ky < 3; ++ky)
        for (int i = 0; i < WIDTH; ++i) _mm512_storeu_ps(sums + ky * tap_row + i * outs, block[ky][i]);
}

// Adds the first `images` of the pairs to sums [tap, in, out].
void add_blocks(const Pairs& pairs, float* sums, long images) {
    with_channels(pairs.s.stored(), [&](auto channels) {
        constexpr long INS = channels;
        for (long group = 0; group < pairs.s.outs; group += LANES)
            for (long kx = 0; kx < 3; ++kx)
                for (long i = 0; i < INS; i += 8) {
                    float* from = sums + (kx * INS + i) * pairs.s.outs + group;
                    if (pairs.s.stride == 1) add_block<INS, 1>(pairs, kx, i, group, from, images);
                    if (pairs.s.stride == 2) add_block<INS, 2>(pairs, kx, i, group, from, images);
                }
    });
}

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
};

// Or to nowhere we know: `residual` is added.
struct WithResidual {
    static constexpr bool SUMS = false;
    const bfloat16* residual;
    Floats result(Floats value, long at, long) const { return value + load(residual + at); }
    void add(Floats, long, long, Floats&, Floats&) const {}
};

// Where the gradients of a convolution go: of its input (or null); of its weight [out, 3, 3, in], to what is there
// or in its place.
struct ConvGradients {
    bfloat16* in;
    float* weight;
    bool accumulate;
};

// The images from `first` to `last`: the gradient of the input, and what they add to that of the weight,
// weight_sums [tap, in, out]. `grad` is room for a padded image.
template <class In, class After>
void backward_images(const In& in, const Gradient<bfloat16>& gradient, const bfloat16* packed, bfloat16* grad_in,
                     const After& after, Sums& sums, float* weight_sums, Range images, const Pairs& pairs,
                     bfloat16* grad) {
    const Shape& s = pairs.s;
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
            if (grad_in) convolve_back(grad, packed, grad_in, n * s.in_size(), s, after, sums.part(n));
        }
        add_blocks(pairs, weight_sums, count);
    }
}

// Adds the parts' sums [part, tap, in, out] to the gradient of the weight.
void add_parts(const float* partial, const ConvGradients& out, const Shape& s, int threads) {
    const long size = TAPS * s.stored() * s.outs;
#pragma omp parallel for num_threads(threads)
    for (long row = 0; row < TAPS * s.ins; ++row) {
        const long tap = row / s.ins, i = row % s.ins;
        for (long group = 0; group < s.outs; group += LANES) {
            Floats sum{};
            for (long part = 0; part < PARTS; ++part)
                sum += load(&partial[part * size + (tap * s.stored() + i) * s.outs + group]);
            for (int o = 0; o < LANES; ++o) {
                float& grad = out.weight[(group + o) * TAPS * s.ins + row];
                grad = out.accumulate ? grad + sum[o] : sum[o];
            }
        }
    }
}

// Both gradients, and the sums that `after` takes of the input's.
template <class In, class After>
Sums convolve_backward(const In& in, const float* weight, const Gradient<bfloat16>& gradient, const After& after,
                       const ConvGradients& out, const Shape& s, int threads) {
    const std::vector<bfloat16> packed = out.in ? pack(weight, s, true) : std::vector<bfloat16>();
    const long size = TAPS * s.stored() * s.outs;
    const std::unique_ptr<float[]> partial(new float[PARTS * size]);
    Sums sums(s.images, s.ins);
#pragma omp parallel num_threads(threads)
    {
        const Pairs pairs(s);
        const Buffer grad(new bfloat16[(s.out_height() + 2) * (s.out_width() + 2) * s.outs]);
#pragma omp for schedule(dynamic, 1)
        for (long part = 0; part < PARTS; ++part) {
            float* weight_sums = &partial[part * size];
            std::memset(weight_sums, 0, size * sizeof(float));
            const Range images{s.images * part / PARTS, s.images * (part + 1) / PARTS};
            backward_images(in, gradient, packed.data(), out.in, after, sums, weight_sums, images, pairs, grad.get());
        }
    }
    add_parts(partial.get(), out, s, threads);
    return sums;
}

}  // namespace
