// A 3x3 convolution of stride s = 1 or 2 and padding 1, and the gradient of its input:
//
//   z[y, x, o] = sum_{ky, kx, i} in[s y + ky - 1, s x + kx - 1, i] * weight[o, ky, kx, i]
//
// Beside a convolution of stride 2 there may be one of kernel 1 and the same stride: a residual block's shortcut.
//
// Channels-last bfloat16 images; z is a multiple of 8 wide and of 2 high, the input s times that. 16, 32 or 64
// channels out and in, or the 3 float32 channels of a picture. BatchNorm's sums are taken of z while it is in
// registers.
//
// The products are vdpbf16ps: in each of 16 lanes, a pair of bfloat16 products is added to a float32. The second
// factor of the pair is one for all lanes. A block of sums stays in registers.

#pragma once

#include <immintrin.h>

#include "conv_input.h"

namespace {

constexpr long TAPS = 9;
constexpr int ROWS = 2, COLUMNS = 8;  // the pixels of a block

inline __m512bh broadcast_pair(const bfloat16* p) {
    int pair;
    std::memcpy(&pair, p, sizeof pair);
    return (__m512bh)_mm512_set1_epi32(pair);
}

inline __m512bh load_pairs(const bfloat16* p) { return (__m512bh)_mm512_loadu_si512(p); }

// out[i] = (left[i], right[i]), for 16 values.
inline void interleave(const bfloat16* left, const bfloat16* right, bfloat16* out) {
    alignas(64) static const uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                   8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i low = _mm512_zextsi256_si512(_mm256_loadu_si256((const __m256i*)left));
    const __m512i both = _mm512_inserti64x4(low, _mm256_loadu_si256((const __m256i*)right), 1);
    _mm512_storeu_si512(out, _mm512_permutexvar_epi16(_mm512_load_si512(order), both));
}

// Weights as the products want them: [out / 16, in / 2, tap, 16 out, 2 in]. `backward` swaps in and out and turns
// the kernel by 180 degrees: the gradient of the input is a convolution of the gradient of the output.
inline std::vector<bfloat16> pack(const float* weight, const Shape& s, bool backward, long taps = TAPS) {
    const long stored = s.stored(), row = taps * stored;  // of an output channel
    std::vector<bfloat16> plain(s.outs * row), packed(s.outs * row);
    if (s.ins == stored)
        for (long i = 0; i < s.outs * row; i += LANES) store(&plain[i], load(weight + i));
    else
        for (long i = 0; i < s.outs * row; ++i)
            plain[i] = i % stored < s.ins ? rounded(weight[i / stored * s.ins + i % stored]) : bfloat16{0};
    const long outs = backward ? stored : s.outs, ins = backward ? s.outs : stored;
    alignas(64) int lanes[LANES];
    for (int o = 0; o < LANES; ++o) lanes[o] = o * int(row / 2);
    bfloat16* next = packed.data();
    for (long group = 0; group < outs; group += LANES)
        for (long i = 0; i < ins; i += 2)
            for (long tap = 0; tap < taps; ++tap, next += 2 * LANES)
                if (backward) {
                    const bfloat16* from = &plain[i * row + (taps - 1 - tap) * stored + group];
                    interleave(from, from + row, next);
                } else {
                    const bfloat16* from = &plain[group * row + tap * stored + i];
                    _mm512_storeu_si512(next, _mm512_i32gather_epi32(_mm512_load_si512(lanes), from, 4));
                }
    return packed;
}

// Calls `run` with the stored number of channels as a constant: the offsets of the products become immediates.
template <class Run>
void with_channels(long channels, Run run) {
    if (channels == 4) run(std::integral_constant<long, 4>{});
    if (channels == 16) run(std::integral_constant<long, 16>{});
    if (channels == 32) run(std::integral_constant<long, 32>{});
    if (channels == 64) run(std::integral_constant<long, 64>{});
}

// What is done with the result of a convolution while it is in registers: `result` makes of it what is stored at
// `at`, and `add` adds that, as it was rounded, to two sums for each channel. `fetch` asks for what it will read at
// `at` before the products, which hide the wait for memory.
struct AsItIs {
    static constexpr bool SUMS = false;
    Floats result(Floats value, long, long) const { return value; }
    void add(Floats, long, long, Floats&, Floats&) const {}
    void fetch(long) const {}
};

// The sums of z - pivot and of its square, for BatchNorm. The pivot is near the mean: the differences from it keep
// the sum of squares free of cancellation.
struct SumsOfZ {
    static constexpr bool SUMS = true;
    const float* pivot;
    Floats result(Floats value, long, long) const { return value; }
    void add(Floats value, long, long channel, Floats& a, Floats& b) const {
        const Floats difference = value - load(pivot + channel);
        a += difference;
        b += difference * difference;
    }
    void fetch(long) const {}
};

// 16 output channels, from `channel` on, of ROWS x COLUMNS pixels, at value `at` of `out`. A pair of inputs is read
// once for all sums it has a part in, up to nine; the nine weights of the pair stay in registers meanwhile.
template <long INS, int STRIDE, int KERNEL, class After>
inline void convolve_block(const bfloat16* padded, const bfloat16* weights, bfloat16* out, long at, long width,
                           long outs, long channel, const After& after, float* sums) {
    for (int r = 0; r < ROWS; ++r)
        for (int c = 0; c < COLUMNS; c += outs == LANES ? 2 : 1) {  // two pixels of 16 channels share a cache line
            const long here = at + (r * width + c) * outs;
            __builtin_prefetch(out + here, 1);
            after.fetch(here);
        }
    __m512 z[ROWS][COLUMNS];
    for (int r = 0; r < ROWS; ++r)
        for (int c = 0; c < COLUMNS; ++c) z[r][c] = _mm512_setzero_ps();
    const long row = (width * STRIDE + 2) * INS;
    for (long i = 0; i < INS; i += 2, padded += 2, weights += KERNEL * KERNEL * 2 * LANES) {
        __m512bh w[KERNEL][KERNEL];
#pragma GCC unroll 9
        for (int tap = 0; tap < KERNEL * KERNEL; ++tap)
            w[tap / KERNEL][tap % KERNEL] = load_pairs(weights + tap * 2 * LANES);
#pragma GCC unroll 5
        for (int r = 0; r < STRIDE * (ROWS - 1) + KERNEL; ++r)
#pragma GCC unroll 17
            for (int c = 0; c < STRIDE * (COLUMNS - 1) + KERNEL; ++c) {
                const __m512bh pair = broadcast_pair(padded + r * row + c * INS);
#pragma GCC unroll 3
                for (int ky = 0; ky < KERNEL; ++ky)
#pragma GCC unroll 3
                    for (int kx = 0; kx < KERNEL; ++kx) {
                        const int y = (r - ky) / STRIDE, x = (c - kx) / STRIDE;
                        const bool whole = (r - ky) % STRIDE == 0 && (c - kx) % STRIDE == 0;
                        if (whole && r >= ky && y < ROWS && c >= kx && x < COLUMNS)
                            z[y][x] = _mm512_dpbf16_ps(z[y][x], w[ky][kx], pair);
                    }
            }
    }
    Floats a{}, b{};
    for (int r = 0; r < ROWS; ++r)
        for (int c = 0; c < COLUMNS; ++c) {
            const long here = at + (r * width + c) * outs;
            store(out + here, after.result((Floats)z[r][c], here, channel));
            if (After::SUMS) after.add(load(out + here), here, channel, a, b);
        }
    if (After::SUMS) {
        store(sums + channel, load(sums + channel) + a);
        store(sums + outs + channel, load(sums + outs + channel) + b);
    }
}

// One padded image of `ins` channels to one of `outs`, `height` x `width`, at value `at` of `out`. `sums` [2, outs].
template <int STRIDE, int KERNEL = 3, class After>
void convolve_image(const bfloat16* padded, const bfloat16* packed, bfloat16* out, long at, long height, long width,
                    long ins, long outs, const After& after, float* sums) {
    with_channels(ins, [&](auto channels) {
        constexpr long INS = channels;
        const long row = (width * STRIDE + 2) * INS;
        const bfloat16* corner = KERNEL == 1 ? padded + row + INS : padded;
        for (long y = 0; y < height; y += ROWS)
            for (long channel = 0; channel < outs; channel += LANES)
                for (long x = 0; x < width; x += COLUMNS)
                    convolve_block<INS, STRIDE, KERNEL>(corner + STRIDE * (y * row + x * INS),
                                                        packed + channel * INS * KERNEL * KERNEL, out,
                                                        at + (y * width + x) * outs + channel, width, outs, channel,
                                                        after, sums);
    });
}

// The gradient of the input of a convolution of stride 2: 16 channels of 2 x 2 * CELLS pixels. `padded` is at the
// gradient of z that lies over the first of them; `weights` are turned, as for stride 1. So of a convolution of
// kernel 1 beside it, if `beside` is not null: the first pixel of each four has a part in that.
template <long OUTS>
inline void spread_block(const bfloat16* padded, const bfloat16* weights, const bfloat16* beside,
                         const bfloat16* beside_weights, bfloat16* grad_in, long width, long ins) {
    constexpr int CELLS = 4;
    // The tap that leads from z at `offset` 0 or 1 to an even or odd pixel; none to an even one from 1.
    constexpr int tap_of[2][2] = {{1, -1}, {2, 0}};
    __m512 sums[2][2][CELLS];
    for (int i = 0; i < 4 * CELLS; ++i) sums[i / 2 % 2][i % 2][i / 4] = _mm512_setzero_ps();
    const long row = (width / 2 + 2) * OUTS;
    for (long o = 0; o < OUTS; o += 2, padded += 2, weights += TAPS * 2 * LANES) {
        __m512bh w[3][3];
#pragma GCC unroll 9
        for (int tap = 0; tap < TAPS; ++tap) w[2 - tap / 3][2 - tap % 3] = load_pairs(weights + tap * 2 * LANES);
#pragma GCC unroll 2
        for (int r = 0; r < 2; ++r)
#pragma GCC unroll 5
            for (int c = 0; c < CELLS + 1; ++c) {
                const __m512bh pair = broadcast_pair(padded + r * row + c * OUTS);
#pragma GCC unroll 8
                for (int k = 0; k < 8; ++k) {
                    const int down = k / 4, right = k / 2 % 2, offset = k % 2, cell = c - offset;
                    const int ky = tap_of[down][r], kx = tap_of[right][offset];
                    if (ky >= 0 && kx >= 0 && cell >= 0 && cell < CELLS)
                        sums[down][right][cell] = _mm512_dpbf16_ps(sums[down][right][cell], w[ky][kx], pair);
                }
            }
    }
    for (long o = 0; beside && o < OUTS; o += 2, beside += 2, beside_weights += 2 * LANES) {
        const __m512bh w = load_pairs(beside_weights);
#pragma GCC unroll 4
        for (int c = 0; c < CELLS; ++c)
            sums[0][0][c] = _mm512_dpbf16_ps(sums[0][0][c], w, broadcast_pair(beside + c * OUTS));
    }
    for (int i = 0; i < 4 * CELLS; ++i) {
        const int down = i / 2 % 2, right = i % 2, cell = i / 4;
        store(grad_in + (down * width + 2 * cell + right) * ins, (Floats)sums[down][right][cell]);
    }
}

// The gradient of the input, at value `at` of `grad_in`, from the padded gradient of z: stride 1.
template <class After>
void convolve_back(const bfloat16* padded, const bfloat16* packed, bfloat16* grad_in, long at, const Shape& s,
                   const After& after, float* sums) {
    convolve_image<1>(padded, packed, grad_in, at, s.height, s.width, s.outs, s.ins, after, sums);
}

// The same: stride 2. `beside`: the gradient of the z of a convolution beside it, without a border; or null.
inline void spread_back(const bfloat16* padded, const bfloat16* packed, const bfloat16* beside,
                        const bfloat16* beside_packed, bfloat16* grad_in, const Shape& s) {
    with_channels(s.outs, [&](auto channels) {
        constexpr long OUTS = channels;
        for (long y = 0; y < s.out_height(); ++y)
            for (long group = 0; group < s.ins; group += LANES)
                for (long x = 0; x < s.out_width(); x += 4)
                    spread_block<OUTS>(padded + ((y + 1) * (s.out_width() + 2) + x + 1) * OUTS,
                                       packed + group * OUTS * TAPS,
                                       beside ? beside + (y * s.out_width() + x) * OUTS : nullptr,
                                       beside_packed + group * OUTS, grad_in + 2 * (y * s.width + x) * s.ins + group,
                                       s.width, s.ins);
    });
}

// The same; and what `in` (or null) reads `size` values further on, the next image, is fetched meanwhile.
template <class In>
struct SumsWithNext : SumsOfZ {
    const In* in;
    long size;
    SumsWithNext(const float* pivot, const In* in, long size) : SumsOfZ{pivot}, in(in), size(size) {}
    void fetch(long at) const {
        if (in) in->fetch(at + size);
    }
};

// Where the z of a convolution goes, and the pivot of its sums: its BatchNorm's running mean will do.
struct Pass {
    const std::vector<bfloat16>& packed;
    bfloat16* z;
    const float* pivot;
};

// z of all images, and the sums of it that BatchNorm needs. `beside`: the same for a convolution of kernel 1.
template <class In>
Sums convolve(const In& in, const Pass& pass, const Shape& s, int threads, const Pass* beside = nullptr,
              Sums* sums_beside = nullptr) {
    Sums sums(s.images, s.outs);
    const SumsWithNext<In> after(pass.pivot, s.in_size() == s.out_size() ? &in : nullptr, s.in_size());
    const auto image = [&](bfloat16* padded, long n) {
        pad(padded, s.height, s.width, s.stored(),
            [&](bfloat16* out, long y) { in.row(out, n * s.in_size() + y * s.width * s.ins, s); });
        const auto run = [&](auto stride, auto kernel, const Pass& to, const auto& after, float* sums) {
            convolve_image<stride, kernel>(padded, to.packed.data(), to.z, n * s.out_size(), s.out_height(),
                                           s.out_width(), s.stored(), s.outs, after, sums);
        };
        const std::integral_constant<int, 1> one;
        const std::integral_constant<int, 2> two;
        const std::integral_constant<int, 3> three;
        if (s.stride == 1) run(one, three, pass, after, sums.part(n));
        if (s.stride == 2) run(two, three, pass, after, sums.part(n));
        if (beside) run(two, one, *beside, SumsOfZ{beside->pivot}, sums_beside->part(n));
    };
#pragma omp parallel num_threads(threads)
    {
        const Buffer padded = padded_image(s.height, s.width, s.stored());
#pragma omp for schedule(dynamic, 4)
        for (long n = 0; n < s.images; ++n) image(padded.get(), n);
    }
    return sums;
}

}  // namespace
