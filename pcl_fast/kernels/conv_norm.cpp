// A 3x3 convolution of stride s = 1 or 2 and padding 1, its training BatchNorm, and an optional residual and ReLU:
//
//   z[y, x, o] = sum_{ky, kx, i} in[s y + ky - 1, s x + kx - 1, i] * weight[o, ky, kx, i]
//   out = relu(BatchNorm(z) + residual)
//
// Channels-last bfloat16 images; z is a multiple of 8 wide and of 2 high, the input s times that. 16, 32 or 64
// channels out and in, or the 3 float32 channels of a picture. BatchNorm sums z while it is in registers; backward,
// the gradient of z is made image by image where the convolutions need it, and never written to memory.
//
// The products are vdpbf16ps: in each of 16 lanes, a pair of bfloat16 products is added to a float32. The second
// factor of the pair is one for all lanes. A block of sums stays in registers.

#include <immintrin.h>

#include <memory>

#include "norm.h"

namespace {

constexpr long TAPS = 9;
constexpr int ROWS = 2, COLUMNS = 8;  // the pixels of a block
constexpr long PIXELS_AT_ONCE = 512;  // of the weight gradient
constexpr long PARTS = 16;            // that the images of a view are divided into, whatever the number of threads

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

// Asks for `count` values from `p` on, to be in the cache when they are needed.
template <int WRITE, class T>
inline void prefetch(const T* p, long count) {
    for (long i = 0; i < count; i += 64 / sizeof(T)) __builtin_prefetch(p + i, WRITE, 2);
}

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

void pad_input(const bfloat16* image, bfloat16* padded, const Shape& s) {
    const long row = s.width * s.ins;
    pad(padded, s.height, s.width, s.ins, [&](bfloat16* out, long y) {
        std::memcpy((void*)out, image + y * row, row * sizeof(bfloat16));
    });
}

void pad_input(const float* image, bfloat16* padded, const Shape& s) {
    const long stored = s.stored();
    pad(padded, s.height, s.width, stored, [&](bfloat16* out, long y) {
        for (long x = 0; x < s.width; ++x)
            for (long i = 0; i < stored; ++i)
                out[x * stored + i] = i < s.ins ? rounded(image[(y * s.width + x) * s.ins + i]) : bfloat16{0};
    });
}

// Weights as the products want them: [out / 16, in / 2, tap, 16 out, 2 in]. `backward` swaps in and out and turns
// the kernel by 180 degrees: the gradient of the input is a convolution of the gradient of the output.
std::vector<bfloat16> pack(const float* weight, const Shape& s, bool backward, int threads) {
    const long outs = backward ? s.ins : s.outs, ins = backward ? s.outs : s.ins;
    const long stored = backward ? s.outs : s.stored();
    std::vector<bfloat16> packed(outs * stored * TAPS, bfloat16{0});
#pragma omp parallel for num_threads(threads)
    for (long o = 0; o < outs; ++o)
        for (long tap = 0; tap < TAPS; ++tap)
            for (long i = 0; i < ins; ++i) {
                const float value = backward ? weight[(i * TAPS + TAPS - 1 - tap) * outs + o]
                                             : weight[(o * TAPS + tap) * ins + i];
                const long pair = (o / LANES * (stored / 2) + i / 2) * TAPS + tap;
                packed[(pair * LANES + o % LANES) * 2 + i % 2] = rounded(value);
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

// 16 output channels of ROWS x COLUMNS pixels. A pair of inputs is read once for all sums it has a part in, up
// to nine; the nine weights of the pair stay in registers meanwhile. `pivot` and `sums` [2, outs], or null: the
// sums for BatchNorm.
template <long INS, int STRIDE>
inline void convolve_block(const bfloat16* padded, const bfloat16* weights, bfloat16* out, long width, long outs,
                           const float* pivot, float* sums) {
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
    Floats a{}, b{}, k{};
    if (sums) k = load(pivot);
    for (int r = 0; r < ROWS; ++r)
        for (int c = 0; c < COLUMNS; ++c) {
            bfloat16* at = out + (r * width + c) * outs;
            const __m256bh halves = _mm512_cvtneps_pbh(z[r][c]);
            std::memcpy((void*)at, &halves, sizeof halves);
            if (sums) {
                const Floats difference = load(at) - k;
                a += difference;
                b += difference * difference;
            }
        }
    if (sums) {
        store(sums, load(sums) + a);
        store(sums + outs, load(sums + outs) + b);
    }
}

// One padded image of `ins` channels to one of `outs`, `height` x `width`. `ahead(y)` is called before each block
// of rows: time to ask for what the next image needs of them.
template <int STRIDE, class Ahead>
void convolve_image(const bfloat16* padded, const bfloat16* packed, bfloat16* out, long height, long width, long ins,
                    long outs, const float* pivot, float* sums, Ahead ahead) {
    with_channels(ins, [&](auto channels) {
        constexpr long INS = channels;
        const long row = (width * STRIDE + 2) * INS;
        for (long y = 0; y < height; y += ROWS) {
            ahead(y);
            for (long group = 0; group < outs; group += LANES)
                for (long x = 0; x < width; x += COLUMNS)
                    convolve_block<INS, STRIDE>(padded + STRIDE * (y * row + x * INS), packed + group * INS * TAPS,
                                                out + (y * width + x) * outs + group, width, outs,
                                                sums ? pivot + group : nullptr, sums ? sums + group : nullptr);
        }
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
        const __m256bh halves = _mm512_cvtneps_pbh(sums[down][right][cell]);
        std::memcpy((void*)(grad_in + (down * width + 2 * cell + right) * ins), &halves, sizeof halves);
    }
}

// The gradient of the input, from the padded gradient of z.
template <class Ahead>
void convolve_back(const bfloat16* padded, const bfloat16* packed, bfloat16* grad_in, const Shape& s, Ahead ahead) {
    if (s.stride == 1)
        return convolve_image<1>(padded, packed, grad_in, s.height, s.width, s.outs, s.ins, nullptr, nullptr, ahead);
    with_channels(s.outs, [&](auto channels) {
        constexpr long OUTS = channels;
        for (long y = 0; y < s.out_height(); ++y) {
            if (y % ROWS == 0) ahead(y);
            for (long group = 0; group < s.ins; group += LANES)
                for (long x = 0; x < s.out_width(); x += 4)
                    spread_block<OUTS>(padded + ((y + 1) * (s.out_width() + 2) + x + 1) * OUTS,
                                       packed + group * OUTS * TAPS,
                                       grad_in + 2 * (y * s.width + x) * s.ins + group, s.width, s.ins);
        }
    });
}

template <class T>
void forward(const T* in, const float* weight, const bfloat16* residual, bfloat16* z, bfloat16* out,
             const Norm& norm, float* mean, float* invstd, const Shape& s, bool relu, int threads) {
    const std::vector<bfloat16> packed = pack(weight, s, false, threads);
    // The running mean is near the mean: differences from it keep the sum of squares free of cancellation.
    const std::vector<float> pivot(norm.running_mean, norm.running_mean + s.outs);
    Sums sums(s.images, s.outs);
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (long part = 0; part < PARTS; ++part) {
        std::vector<bfloat16> padded((s.height + 2) * (s.width + 2) * s.stored());
        const long last = s.images * (part + 1) / PARTS;
        for (long n = s.images * part / PARTS; n < last; ++n) {
            pad_input(in + n * s.in_size(), padded.data(), s);
            const auto ahead = [&](long y) {
                if (n + 1 == last) return;
                const long in_row = s.in_size() / s.out_height(), out_row = s.out_size() / s.out_height();
                prefetch<0>(in + (n + 1) * s.in_size() + y * in_row, ROWS * in_row);
                prefetch<1>(z + (n + 1) * s.out_size() + y * out_row, ROWS * out_row);
            };
            const auto run = [&](auto stride) {
                convolve_image<stride>(padded.data(), packed.data(), z + n * s.out_size(), s.out_height(),
                                       s.out_width(), s.stored(), s.outs, pivot.data(), sums.part(n), ahead);
            };
            if (s.stride == 1) run(std::integral_constant<int, 1>{});
            if (s.stride == 2) run(std::integral_constant<int, 2>{});
        }
    }
    const long rows = s.images * s.out_height() * s.out_width();
    normalise(z, residual, out, norm, sums, pivot.data(), mean, invstd, rows, relu, threads);
}

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
    alignas(64) static const uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                   8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i interleave = _mm512_load_si512(order);
    for (long x = 0; x < count; x += step)
        for (long c = 0; c < channels; c += LANES, out += 2 * LANES) {
            const __m256i left = _mm256_loadu_si256((const __m256i*)(in + x * channels + c));
            const __m256i right = _mm256_loadu_si256((const __m256i*)(in + (x + gap) * channels + c));
            const __m512i both = _mm512_inserti64x4(_mm512_zextsi256_si512(left), right, 1);
            _mm512_storeu_si512(out, _mm512_permutexvar_epi16(interleave, both));
        }
}

// What the gradient of the weight is summed from: some images' inputs and gradients of z, in pairs of pixels.
struct Pairs {
    const Shape& s;
    // Stride 1: the rows of the input, each pixel with the next one. Stride 2: those of the padded input but the
    // last, each pixel with the next but one.
    long first_row, rows, row, grad_row;
    long at_once;  // Small images are taken several at a time, so that the sums seldom leave the registers.
    std::vector<bfloat16> in, grad;
    explicit Pairs(const Shape& s)
        : s(s),
          first_row(s.stride == 1 ? 1 : 0),
          rows(s.stride == 1 ? s.height : s.height + 1),
          row((s.stride == 1 ? s.width + 1 : s.width) * s.stored() * 2),
          grad_row(s.out_width() * s.outs),
          at_once(s.out_height() * s.out_width() < PIXELS_AT_ONCE
                      ? PIXELS_AT_ONCE / (s.out_height() * s.out_width())
                      : 1),
          in(at_once * rows * row),
          grad(at_once * (s.out_height() + 2) * grad_row, bfloat16{0}) {}  // a row of zeros above and below
    // The k-th of those at once, from padded images.
    void set(long k, const bfloat16* padded, const bfloat16* padded_grad) {
        for (long y = 0; y < rows; ++y)
            pair_pixels(padded + (first_row + y) * (s.width + 2) * s.stored(), &in[(k * rows + y) * row],
                        row / (s.stored() * 2), 1, s.stride, s.stored());
        for (long y = 0; y < s.out_height(); ++y)
            pair_pixels(padded_grad + ((y + 1) * (s.out_width() + 2) + 1) * s.outs,
                        &grad[(k * (s.out_height() + 2) + y + 1) * grad_row], s.out_width(), 2, 1, s.outs);
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
            const bfloat16* grad = &pairs.grad[(n * (pairs.s.out_height() + 2) + y) * pairs.grad_row + group * 2];
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

// The images from `first` to `last`: the gradient of the input (if grad_in is not null), and what they add to that
// of the weight, sums [tap, in, out].
template <class T>
void backward_images(const T* in, const Gradient<bfloat16>& gradient, const bfloat16* packed, bfloat16* grad_in,
                     float* sums, long first, long last, const Shape& s) {
    Pairs pairs(s);
    std::vector<bfloat16> padded((s.height + 2) * (s.width + 2) * s.stored());
    std::vector<bfloat16> grad((s.out_height() + 2) * (s.out_width() + 2) * s.outs);
    for (long start = first; start < last; start += pairs.at_once) {
        const long count = last - start < pairs.at_once ? last - start : pairs.at_once;
        for (long n = start; n < start + count; ++n) {
            pad_input(in + n * s.in_size(), padded.data(), s);
            pad(grad.data(), s.out_height(), s.out_width(), s.outs, [&](bfloat16* row, long y) {
                const long from = (n * s.out_height() + y) * pairs.grad_row;
                for (long x = 0; x < s.out_width(); ++x)
                    for (long c = 0; c < s.outs; c += LANES)
                        store(row + x * s.outs + c, gradient.at(from + x * s.outs + c, c));
            });
            pairs.set(n - start, padded.data(), grad.data());
            const auto ahead = [&](long y) {
                if (n + 1 == last) return;
                const long in_row = s.in_size() / s.out_height(), from_in = (n + 1) * s.in_size() + y * in_row;
                const long from = (n + 1) * s.out_size() + y * pairs.grad_row, size = ROWS * pairs.grad_row;
                prefetch<0>(in + from_in, ROWS * in_row);
                prefetch<1>(grad_in + from_in, ROWS * in_row);
                prefetch<0>(gradient.grad + from, size);
                prefetch<0>(gradient.x + from, size);
                if (gradient.mask) prefetch<0>(gradient.mask + from, size);
            };
            if (grad_in) convolve_back(grad.data(), packed, grad_in + n * s.in_size(), s, ahead);
        }
        add_blocks(pairs, sums, count);
    }
}

template <class T>
void backward(const bfloat16* grad_out, const T* in, const float* weight, const bfloat16* z, const bfloat16* out,
              bfloat16* grad_in, float* grad_weight, bfloat16* grad_residual, const float* norm_weight,
              const float* mean, const float* invstd, float* grad_norm_weight, float* grad_norm_bias,
              const Shape& s, int threads) {
    const Gradient<bfloat16> gradient =
        sum_gradients(grad_out, z, out, grad_residual, norm_weight, mean, invstd, grad_norm_weight, grad_norm_bias,
                      s.images * s.out_height() * s.out_width(), s.outs, threads);
    const std::vector<bfloat16> packed = grad_in ? pack(weight, s, true, threads) : std::vector<bfloat16>();
    const long size = TAPS * s.stored() * s.outs;
    const std::unique_ptr<float[]> partial(new float[PARTS * size]);  // [part, tap, in, out]
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (long part = 0; part < PARTS; ++part) {
        float* sums = &partial[part * size];
        std::memset(sums, 0, size * sizeof(float));
        backward_images(in, gradient, packed.data(), grad_in, sums, s.images * part / PARTS,
                        s.images * (part + 1) / PARTS, s);
    }
#pragma omp parallel for num_threads(threads)
    for (long row = 0; row < TAPS * s.ins; ++row) {
        const long tap = row / s.ins, i = row % s.ins;
        for (long group = 0; group < s.outs; group += LANES) {
            Floats sum{};
            for (long part = 0; part < PARTS; ++part)
                sum += load(&partial[part * size + (tap * s.stored() + i) * s.outs + group]);
            for (int o = 0; o < LANES; ++o) grad_weight[(group + o) * TAPS * s.ins + row] = sum[o];
        }
    }
}

}  // namespace

// `views` batches of `images` lie one after the other, each with its own statistics: mean, invstd and the gradients
// of parameters are [views, ...]. `in` is float32 where it has 3 channels. Weights and their gradients are
// [out, 3, 3, in]. `residual`, `grad_residual` and `grad_in` may be null, and `out` in backward without ReLU.
extern "C" {

void conv_norm_forward(const void* in, const float* weight, const bfloat16* residual, bfloat16* z, bfloat16* out,
                       const float* norm_weight, const float* norm_bias, float* running_mean, float* running_var,
                       float* mean, float* invstd, double eps, double momentum, long views, long images, long height,
                       long width, long ins, long outs, long stride, int relu, int threads) {
    const Norm norm{norm_weight, norm_bias, running_mean, running_var, eps, momentum};
    const Shape s{images, height, width, ins, outs, stride};
    const long in_size = images * s.in_size(), out_size = images * s.out_size();
    for (long v = 0; v < views; ++v) {
        const auto run = [&](auto from) {
            forward(from, weight, residual ? residual + v * out_size : nullptr, z + v * out_size, out + v * out_size,
                    norm, mean + v * outs, invstd + v * outs, s, relu, threads);
        };
        if (ins == 3)
            run((const float*)in + v * in_size);
        else
            run((const bfloat16*)in + v * in_size);
    }
}

void conv_norm_backward(const bfloat16* grad_out, const void* in, const float* weight, const bfloat16* z,
                        const bfloat16* out, bfloat16* grad_in, float* grad_weight, bfloat16* grad_residual,
                        const float* norm_weight, const float* mean, const float* invstd, float* grad_norm_weight,
                        float* grad_norm_bias, long views, long images, long height, long width, long ins, long outs,
                        long stride, int threads) {
    const Shape s{images, height, width, ins, outs, stride};
    const long in_size = images * s.in_size(), out_size = images * s.out_size();
    for (long v = 0; v < views; ++v) {
        const auto run = [&](auto from) {
            backward(grad_out + v * out_size, from, weight, z + v * out_size, out ? out + v * out_size : nullptr,
                     grad_in ? grad_in + v * in_size : nullptr, grad_weight + v * outs * TAPS * ins,
                     grad_residual ? grad_residual + v * out_size : nullptr, norm_weight, mean + v * outs,
                     invstd + v * outs, grad_norm_weight + v * outs, grad_norm_bias + v * outs, s, threads);
        };
        if (ins == 3)
            run((const float*)in + v * in_size);
        else
            run((const bfloat16*)in + v * in_size);
    }
}
}
