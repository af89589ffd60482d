// The gradient of a 3x3 convolution's weight: products of the input and the gradient of z, summed over pixels.
//
// Here a pair of products is that of two neighbouring pixels.

#pragma once

#include "conv3x3.h"

namespace {

constexpr long PIXELS_AT_ONCE = 512;

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

// The gradient of z of a convolution of kernel 1 and stride 2 beside the other: of one image as it is, and of some in
// pairs of pixels.
struct BesidePairs {
    const Gradient<bfloat16>& gradient;
    const Shape& s;
    Buffer image, grad;
    BesidePairs(const Gradient<bfloat16>& gradient, const Pairs& pairs)
        : gradient(gradient),
          s(pairs.s),
          image(new bfloat16[s.out_size()]),
          grad(new bfloat16[pairs.at_once * s.out_size()]) {}
    // The k-th of those at once: image n.
    void set(long k, long n) const {
        for (long at = 0; at < s.out_size(); at += s.outs)
            for (long c = 0; c < s.outs; c += LANES) store(&image[at + c], gradient.at(n * s.out_size() + at + c, c));
        pair_pixels(image.get(), &grad[k * s.out_size()], s.out_size() / s.outs, 2, 1, s.outs);
    }
};

// Adds the first `images` of the pairs to sums [in, out] for the convolution of kernel 1: it meets the input where the
// middle of the other's kernel does.
inline void add_beside(const Pairs& pairs, const BesidePairs& beside, float* sums, long images) {
    constexpr int WIDTH = 8;
    const Shape& s = pairs.s;
    for (long group = 0; group < s.outs; group += LANES)
        for (long first = 0; first < s.ins; first += WIDTH) {
            __m512 block[WIDTH];
            for (int i = 0; i < WIDTH; ++i) block[i] = _mm512_loadu_ps(sums + (first + i) * s.outs + group);
            const bfloat16* grad = &beside.grad[group * 2];
            for (long y = 0; y < images * s.out_height(); ++y) {
                const long row = y / s.out_height() * pairs.rows + 2 * (y % s.out_height()) + 1;
                const bfloat16* in = &pairs.in[row * pairs.row + (s.ins + first) * 2];
                for (long x = 0; x < s.out_width(); x += 2, in += 4 * s.ins * 2, grad += s.outs * 2) {
                    const __m512bh g = load_pairs(grad);
#pragma GCC unroll 8
                    for (int i = 0; i < WIDTH; ++i)
                        block[i] = _mm512_dpbf16_ps(block[i], g, broadcast_pair(in + i * 2));
                }
            }
            for (int i = 0; i < WIDTH; ++i) _mm512_storeu_ps(sums + (first + i) * s.outs + group, block[i]);
        }
}

}  // namespace
