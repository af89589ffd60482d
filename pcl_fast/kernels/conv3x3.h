// A 3x3 convolution of stride s = 1 or 2 and padding 1, and the gradient of its input:
//
//   z[y, x, o] = sum_{ky, kx, i} in[s y + ky - 1, s x + kx - 1, i] * weight[o, ky, kx, i]
//
// Channels-last bfloat16 images; z is a multiple of 8 wide and of 2 high, the input s times that. 16, 32 or 64
// channels out and in, or the 3 float32 channels of a picture. BatchNorm's sums are taken of z while it is in
// registers.
//
// The products are vdpbf16ps: in each of 16 lanes, a pair of bfloat16 products is added to a float32. The second
// factor of the pair is one for all lanes. A block of sums stays in registers.

#pragma once

#include <immintrin.h>

#include <memory>

#include "norm.h"

namespace {

constexpr long TAPS = 9;
constexpr int ROWS = 2, COLUMNS = 8;  // the pixels of a block
constexpr long PARTS = 16;            // that the images of a view are divided into, whatever the number of threads

using Buffer = std::unique_ptr<bfloat16[]>;  // not initialised

struct Shape {
    long images, height, width, ins, outs, stride;  // height and width of the input
    long out_height() const { return height / stride; }
    long out_width() const { return width / stride; }
    long in_size() const { return height * width * ins; }  // of an image
    long out_size() const { return out_height() * out_width() * outs; }
    // Channels of the input in memory of ours: pairs need an even number.
    long stored() const { return ins == 3 ? 4 : ins; }
};

inline __m512bh broadcast_pair(const bfloat16* p) {
    int pair;
    std::memcpy(&pair, p, sizeof pair);
    return (__m512bh)_mm512_set1_epi32(pair);
}

inline __m512bh load_pairs(const bfloat16* p) { return (__m512bh)_mm512_loadu_si512(p); }

inline bfloat16 rounded(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    if (value != value) return bfloat16{(uint16_t)(bits >> 16 | 0x40)};
    return bfloat16{(uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

// What a convolution reads: images as they are. `row` writes the row that begins at value `at` as bfloat16.
template <class T>
struct Plain {
    const T* values;
    void row(bfloat16* out, long at, const Shape& s) const {
        if constexpr (std::is_same_v<T, bfloat16>) {
            std::memcpy((void*)out, values + at, s.width * s.ins * sizeof(bfloat16));
        } else {
            for (long x = 0; x < s.width; ++x)
                for (long i = 0; i < s.stored(); ++i)
                    out[x * s.stored() + i] = i < s.ins ? rounded(values[at + x * s.ins + i]) : bfloat16{0};
        }
    }
};

// Or relu(line(z)), made where it is read.
struct Activated {
    const bfloat16* values;
    Line line;
    void row(bfloat16* out, long at, const Shape& s) const {
        for (long x = 0; x < s.width; ++x)
            for (long c = 0; c < s.ins; c += LANES) {
                const Floats value = line.at(load(values + at + x * s.ins + c), c);
                store(out + x * s.ins + c, where_positive(value, value));
            }
    }
};

// One image with a border of zeros, [height + 2, width + 2, channels]: `fill(row, y)` writes the pixels of a row.
template <class Fill>
void pad(bfloat16* padded, long height, long width, long channels, Fill fill) {
    const long row = (width + 2) * channels;
    std::memset((void*)padded, 0, row * sizeof(bfloat16));
    std::memset((void*)(padded + (height + 1) * row), 0, row * sizeof(bfloat16));
    for (long y = 0; y < height; ++y) {
        bfloat16* out = padded + (y + 1) * row;
        std::memset((void*)out, 0, channels * sizeof(bfloat16));
        fill(out + channels, y);
        std::memset((void*)(out + row - channels), 0, channels * sizeof(bfloat16));
    }
}

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
inline std::vector<bfloat16> pack(const float* weight, const Shape& s, bool backward) {
    const long stored = s.stored(), row = TAPS * stored;  // of an output channel
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
            for (long tap = 0; tap < TAPS; ++tap, next += 2 * LANES)
                if (backward) {
                    const bfloat16* from = &plain[i * row + (TAPS - 1 - tap) * stored + group];
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
// `at`, and `add` adds that, as it was rounded, to two sums for each channel.
struct AsItIs {
    static constexpr bool SUMS = false;
    Floats result(Floats value, long, long) const { return value; }
    void add(Floats, long, long, Floats&, Floats&) const {}
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
};

// 16 output channels, from `channel` on, of ROWS x COLUMNS pixels, at value `at` of `out`. A pair of inputs is read
// once for all sums it has a part in, up to nine; the nine weights of the pair stay in registers meanwhile.
template <long INS, int STRIDE, class After>
inline void convolve_block(const bfloat16* padded, const bfloat16* weights, bfloat16* out, long at, long width,
                           long outs, long channel, const After& after, float* sums) {
    __m512 z[ROWS][COLUMNS];
    for (int r = 0; r < ROWS; ++r)
        for (int c = 0; c < COLUMNS; ++c) z[r][c] = _mm512_setzero_ps();
    const long row = (width * STRIDE + 2) * INS;
    for (long i = 0; i < INS; i += 2, padded += 2, weights += TAPS * 2 * LANES) {
        __m512bh w[3][3];
#pragma GCC unroll 9
        for (int tap = 0; tap < TAPS; ++tap) w[tap / 3][tap % 3] = load_pairs(weights + tap * 2 * LANES);
#pragma GCC unroll 5
        for (int r = 0; r < STRIDE * (ROWS - 1) + 3; ++r)
#pragma GCC unroll 17
            for (int c = 0; c < STRIDE * (COLUMNS - 1) + 3; ++c) {
                const __m512bh pair = broadcast_pair(padded + r * row + c * INS);
#pragma GCC unroll 3
                for (int ky = 0; ky < 3; ++ky)
#pragma GCC unroll 3
                    for (int kx = 0; kx < 3; ++kx) {
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
template <int STRIDE, class After>
void convolve_image(const bfloat16* padded, const bfloat16* packed, bfloat16* out, long at, long height, long width,
                    long ins, long outs, const After& after, float* sums) {
    with_channels(ins, [&](auto channels) {
        constexpr long INS = channels;
        const long row = (width * STRIDE + 2) * INS;
        for (long y = 0; y < height; y += ROWS)
            for (long channel = 0; channel < outs; channel += LANES)
                for (long x = 0; x < width; x += COLUMNS)
                    convolve_block<INS, STRIDE>(padded + STRIDE * (y * row + x * INS), packed + channel * INS * TAPS,
                                                out, at + (y * width + x) * outs + channel, width, outs, channel,
                                                after, sums);
    });
}

// The gradient of the input of a convolution of stride 2: 16 channels of 2 x 2 * CELLS pixels. `padded` is at the
// gradient of z that lies over the first of them; `weights` are turned, as for stride 1.
template <long OUTS>
inline void spread_block(const bfloat16* padded, const bfloat16* weights, bfloat16* grad_in, long width, long ins) {
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
    for (int i = 0; i < 4 * CELLS; ++i) {
        const int down = i / 2 % 2, right = i % 2, cell = i / 4;
        store(grad_in + (down * width + 2 * cell + right) * ins, (Floats)sums[down][right][cell]);
    }
}

// The gradient of the input, at value `at` of `grad_in`, from the padded gradient of z. `after`: with stride 1 only.
template <class After>
void convolve_back(const bfloat16* padded, const bfloat16* packed, bfloat16* grad_in, long at, const Shape& s,
                   const After& after, float* sums) {
    if (s.stride == 1)
        return convolve_image<1>(padded, packed, grad_in, at, s.height, s.width, s.outs, s.ins, after, sums);
    with_channels(s.outs, [&](auto channels) {
        constexpr long OUTS = channels;
        for (long y = 0; y < s.out_height(); ++y)
            for (long group = 0; group < s.ins; group += LANES)
                for (long x = 0; x < s.out_width(); x += 4)
                    spread_block<OUTS>(padded + ((y + 1) * (s.out_width() + 2) + x + 1) * OUTS,
                                       packed + group * OUTS * TAPS,
                                       grad_in + at + 2 * (y * s.width + x) * s.ins + group, s.width, s.ins);
    });
}

// z of all images, and the sums of it that BatchNorm needs; its running mean will do for a pivot.
template <class In>
Sums convolve(const In& in, const std::vector<bfloat16>& packed, bfloat16* z, const float* pivot, const Shape& s,
              int threads) {
    Sums sums(s.images, s.outs);
    const auto image = [&](bfloat16* padded, long n) {
        pad(padded, s.height, s.width, s.stored(),
            [&](bfloat16* out, long y) { in.row(out, n * s.in_size() + y * s.width * s.ins, s); });
        const auto run = [&](auto stride) {
            convolve_image<stride>(padded, packed.data(), z, n * s.out_size(), s.out_height(), s.out_width(),
                                   s.stored(), s.outs, SumsOfZ{pivot}, sums.part(n));
        };
        if (s.stride == 1) run(std::integral_constant<int, 1>{});
        if (s.stride == 2) run(std::integral_constant<int, 2>{});
    };
#pragma omp parallel num_threads(threads)
    {
        const Buffer padded(new bfloat16[(s.height + 2) * (s.width + 2) * s.stored()]);
#pragma omp for schedule(dynamic, 1)
        for (long part = 0; part < PARTS; ++part) {
            const long end = s.images * (part + 1) / PARTS;
            for (long n = s.images * part / PARTS; n < end; ++n) image(padded.get(), n);
        }
    }
    return sums;
}

}  // namespace
