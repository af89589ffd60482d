// The 3x3 convolution of stride 1 and padding 1, forward and backward, on channels-last bfloat16 images.
//
//   out[y, x, o] = sum_{ky, kx, i} in[y + ky - 1, x + kx - 1, i] * weight[o, i, ky, kx]
//
// Channels are multiples of 16, images multiples of 8 wide and 2 high. The work is done by vdpbf16ps: in each of
// 16 lanes, a pair of bfloat16 products is added to a float32. The second factor of the pair is one broadcast
// for all lanes, read from memory by the instruction itself, so the sums of a block stay in registers.

#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

namespace {

constexpr long LANES = 16;
constexpr long TAPS = 9;
constexpr int ROWS = 2, COLUMNS = 8;  // the pixels of a block

typedef uint16_t bfloat16;

struct Image {
    long height, width;
};

inline __m512bh broadcast_pair(const void* p) {
    int pair;
    std::memcpy(&pair, p, sizeof pair);
    return (__m512bh)_mm512_set1_epi32(pair);
}

inline __m512bh load_pairs(const bfloat16* p) { return (__m512bh)_mm512_loadu_si512(p); }

inline void store_rounded(bfloat16* p, __m512 v) {
    const __m256bh rounded = _mm512_cvtneps_pbh(v);
    std::memcpy(p, &rounded, sizeof rounded);
}

inline bfloat16 rounded(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

// Asks for `count` values from `p` on, to be in the cache when the next image comes.
template <int WRITE>
inline void prefetch(const bfloat16* p, long count) {
    for (long i = 0; i < count; i += 32) __builtin_prefetch(p + i, WRITE, 2);
}

// One image with a border of zeros: [height + 2, width + 2, channels].
void pad(const bfloat16* in, bfloat16* padded, Image image, long channels) {
    const long row = (image.width + 2) * channels;
    std::memset(padded, 0, row * sizeof(bfloat16));
    std::memset(padded + (image.height + 1) * row, 0, row * sizeof(bfloat16));
    for (long y = 0; y < image.height; ++y) {
        bfloat16* out = padded + (y + 1) * row;
        std::memset(out, 0, channels * sizeof(bfloat16));
        std::memcpy(out + channels, in + y * image.width * channels, image.width * channels * sizeof(bfloat16));
        std::memset(out + row - channels, 0, channels * sizeof(bfloat16));
    }
}

// Weights as the products want them: [out / 16, in / 2, tap, 16 out, 2 in]. `backward` swaps in and out and turns
// the kernel by 180 degrees: the gradient of the input is a convolution of the gradient of the output.
std::vector<bfloat16> pack(const float* weight, long outs, long ins, bool backward, int threads) {
    std::vector<bfloat16> packed(outs * ins * TAPS);
#pragma omp parallel for num_threads(threads)
    for (long o = 0; o < outs; ++o)
        for (long tap = 0; tap < TAPS; ++tap)
            for (long i = 0; i < ins; ++i) {
                const float value = backward ? weight[(i * TAPS + TAPS - 1 - tap) * outs + o]
                                             : weight[(o * TAPS + tap) * ins + i];
                packed[(((o / LANES * (ins / 2) + i / 2) * TAPS + tap) * LANES + o % LANES) * 2 + i % 2] =
                    rounded(value);
            }
    return packed;
}

// 16 output channels of ROWS x COLUMNS pixels. A pair of inputs is read once for all sums it has a part in, up
// to nine; the nine weights of the pair stay in registers meanwhile.
template <long INS>
inline void convolve_block(const bfloat16* padded, const bfloat16* weights, bfloat16* out, long width, long outs) {
    __m512 sums[ROWS][COLUMNS];
    for (int r = 0; r < ROWS; ++r)
        for (int c = 0; c < COLUMNS; ++c) sums[r][c] = _mm512_setzero_ps();
    const long row = (width + 2) * INS;
    for (long i = 0; i < INS; i += 2, padded += 2, weights += TAPS * 2 * LANES) {
        __m512bh w[3][3];
#pragma GCC unroll 9
        for (int tap = 0; tap < TAPS; ++tap) w[tap / 3][tap % 3] = load_pairs(weights + tap * 2 * LANES);
#pragma GCC unroll 4
        for (int r = 0; r < ROWS + 2; ++r)
#pragma GCC unroll 10
            for (int c = 0; c < COLUMNS + 2; ++c) {
                const __m512bh pair = broadcast_pair(padded + r * row + c * INS);
#pragma GCC unroll 3
                for (int ky = 0; ky < 3; ++ky)
#pragma GCC unroll 3
                    for (int kx = 0; kx < 3; ++kx) {
                        const int y = r - ky, x = c - kx;
                        if (0 <= y && y < ROWS && 0 <= x && x < COLUMNS)
                            sums[y][x] = _mm512_dpbf16_ps(sums[y][x], w[ky][kx], pair);
                    }
            }
    }
    for (int r = 0; r < ROWS; ++r)
        for (int c = 0; c < COLUMNS; ++c) store_rounded(out + (r * width + c) * outs, sums[r][c]);
}

template <long INS>
void convolve(const bfloat16* in, const float* weight, bfloat16* out, long images, Image image, long outs,
              bool backward, int threads) {
    const std::vector<bfloat16> packed = pack(weight, outs, INS, backward, threads);
    const long pixels = image.height * image.width, row = (image.width + 2) * INS;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int thread = 0; thread < threads; ++thread) {
        std::vector<bfloat16> padded((image.height + 2) * row);
        const long last = images * (thread + 1) / threads;
        for (long n = images * thread / threads; n < last; ++n) {
            pad(in + n * pixels * INS, padded.data(), image, INS);
            for (long y = 0; y < image.height; y += ROWS) {
                if (n + 1 < last) {
                    const long next = (n + 1) * pixels + y * image.width;
                    prefetch<0>(in + next * INS, ROWS * image.width * INS);
                    prefetch<1>(out + next * outs, ROWS * image.width * outs);
                }
                for (long group = 0; group < outs; group += LANES)
                    for (long x = 0; x < image.width; x += COLUMNS)
                        convolve_block<INS>(&padded[y * row + x * INS], &packed[group * INS * TAPS],
                                            out + (n * pixels + y * image.width + x) * outs + group, image.width,
                                            outs);
            }
        }
    }
}

// Pairs of neighbouring pixels: out[x, channel] = (in[x, channel], in[x + 1, channel]), for x from 0 to
// count - 1 by `step`.
inline void pair_pixels(const bfloat16* in, bfloat16* out, long count, long step, long channels) {
    alignas(64) static const uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                   8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i interleave = _mm512_load_si512(order);
    for (long x = 0; x < count; x += step)
        for (long c = 0; c < channels; c += LANES, out += 2 * LANES) {
            const __m256i left = _mm256_loadu_si256((const __m256i*)(in + x * channels + c));
            const __m256i right = _mm256_loadu_si256((const __m256i*)(in + (x + 1) * channels + c));
            const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(left), right, 1);
            _mm512_storeu_si512(out, _mm512_permutexvar_epi16(interleave, both));
        }
}

// Adds some images' share to 16 outs x 8 ins x the 3 taps of a column of the kernel: sums [3, 3, ins, outs]. A
// pair of inputs is read once for the three rows of gradients it meets.
template <long INS>
inline void add_block(const bfloat16* in_pairs, const bfloat16* grad_pairs, float* sums, long images, Image image,
                      long outs) {
    constexpr int WIDTH = 8;
    const long in_row = (image.width + 1) * INS * 2, grad_row = image.width * outs, tap_row = 3 * INS * outs;
    __m512 block[3][WIDTH];
    for (int ky = 0; ky < 3; ++ky)
        for (int i = 0; i < WIDTH; ++i) block[ky][i] = _mm512_loadu_ps(sums + ky * tap_row + i * outs);
    for (long n = 0; n < images; ++n, grad_pairs += 2 * grad_row)
        for (long y = 0; y < image.height; ++y, in_pairs += in_row, grad_pairs += grad_row) {
            const bfloat16 *in = in_pairs, *grad = grad_pairs;  // rows y and y - 1
            for (long x = 0; x < image.width; x += 2, in += 2 * INS * 2, grad += outs * 2) {
                const __m512bh g[3] = {load_pairs(grad + 2 * grad_row), load_pairs(grad + grad_row), load_pairs(grad)};
#pragma GCC unroll 8
                for (int i = 0; i < WIDTH; ++i) {
                    const __m512bh pair = broadcast_pair(in + i * 2);
#pragma GCC unroll 3
                    for (int ky = 0; ky < 3; ++ky) block[ky][i] = _mm512_dpbf16_ps(block[ky][i], g[ky], pair);
                }
            }
        }
    for (int ky = 0; ky < 3; ++ky)
        for (int i = 0; i < WIDTH; ++i) _mm512_storeu_ps(sums + ky * tap_row + i * outs, block[ky][i]);
}

// A thread's share of the images: adds to sums [tap, in, out]. Small images are taken several at a time, so that
// the sums seldom leave the registers.
template <long INS>
void add_images(const bfloat16* in, const bfloat16* grad, float* sums, long images, Image image, long outs) {
    const long pixels = image.height * image.width, blocks = outs / LANES * 3 * (INS / 8);
    const long pairs_row = (image.width + 1) * INS * 2, grad_row = image.width * outs;
    const long at_once = pixels < 512 ? 512 / pixels : 1;
    std::vector<bfloat16> padded((image.height + 2) * (image.width + 2) * INS);
    std::vector<bfloat16> in_pairs(at_once * image.height * pairs_row);
    std::vector<bfloat16> grad_pairs(at_once * (image.height + 2) * grad_row);  // a row of zeros above and below
    for (long n = 0; n < images; n += at_once) {
        const long count = images - n < at_once ? images - n : at_once;
        for (long k = 0; k < count; ++k) {
            pad(in + (n + k) * pixels * INS, padded.data(), image, INS);
            for (long y = 0; y < image.height; ++y)
                pair_pixels(&padded[(y + 1) * (image.width + 2) * INS],
                            &in_pairs[(k * image.height + y) * pairs_row], image.width + 1, 1, INS);
            pair_pixels(grad + (n + k) * pixels * outs, &grad_pairs[(k * (image.height + 2) + 1) * grad_row], pixels,
                        2, outs);
        }
        const long left = images - n - count, next = (left < at_once ? left : at_once) * pixels;
        long block = 0;
        for (long group = 0; group < outs; group += LANES)
            for (long kx = 0; kx < 3; ++kx)
                for (long i = 0; i < INS; i += 8, ++block) {
                    const long from = (n + count) * pixels + next * block / blocks, size = next / blocks + 1;
                    prefetch<0>(in + from * INS, size * INS);
                    prefetch<0>(grad + from * outs, size * outs);
                    add_block<INS>(&in_pairs[(kx * INS + i) * 2], &grad_pairs[group * 2],
                                   sums + (kx * INS + i) * outs + group, count, image, outs);
                }
    }
}

template <long INS>
void weight_gradient(const bfloat16* in, const bfloat16* grad, float* grad_weight, long images, Image image,
                     long outs, int threads) {
    const long pixels = image.height * image.width, size = TAPS * INS * outs;
    std::vector<float> partial(threads * size, 0.0f);  // [thread, tap, in, out]
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int thread = 0; thread < threads; ++thread) {
        const long first = images * thread / threads, last = images * (thread + 1) / threads;
        add_images<INS>(in + first * pixels * INS, grad + first * pixels * outs, &partial[thread * size], last - first,
                        image, outs);
    }
#pragma omp parallel for num_threads(threads)
    for (long o = 0; o < outs; ++o)
        for (long row = 0; row < TAPS * INS; ++row) {
            float sum = 0;
            for (int thread = 0; thread < threads; ++thread) sum += partial[thread * size + row * outs + o];
            grad_weight[o * TAPS * INS + row] = sum;
        }
}

// Calls `run` with the number of channels as a constant: the offsets of the products become immediates.
template <class Run>
void with_channels(long channels, Run run) {
    if (channels == 16) run(std::integral_constant<long, 16>{});
    if (channels == 32) run(std::integral_constant<long, 32>{});
    if (channels == 64) run(std::integral_constant<long, 64>{});
}

}  // namespace

extern "C" {

// Weights and their gradients are [out, 3, 3, in].
// `backward`: `in` is the gradient of the output, `out` that of the input, `ins` and `outs` the channels of these,
// and `weight` the convolution's own, [ins, 3, 3, outs].
void conv3x3(const bfloat16* in, const float* weight, bfloat16* out, long images, long height, long width, long ins,
             long outs, int backward, int threads) {
    with_channels(ins, [&](auto channels) {
        convolve<channels>(in, weight, out, images, Image{height, width}, outs, backward, threads);
    });
}

void conv3x3_weight_gradient(const bfloat16* in, const bfloat16* grad, float* grad_weight, long images, long height,
                             long width, long ins, long outs, int threads) {
    with_channels(ins, [&](auto channels) {
        weight_gradient<channels>(in, grad, grad_weight, images, Image{height, width}, outs, threads);
    });
}
}
