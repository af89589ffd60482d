// BatchNorm in training, with an optional residual and ReLU, over channels-last rows.
//
//   y = relu((x - mean) / sqrt(var + eps) * weight + bias + residual)
//
// A tensor [B, C, H, W] in channels-last order is a matrix of B * H * W rows of C values; C is a multiple of
// 16. Values are bfloat16 or float32, sums and parameters float32, totals double. Rows are summed in blocks of
// fixed size and the blocks added in order, so the result does not depend on the number of threads.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

namespace {

constexpr int LANES = 16;
constexpr int MAX_VECTORS = 4;  // vectors of channels summed in registers at a time
constexpr long BLOCK = 256;     // rows

typedef float Floats __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES), aligned(2)));

struct bfloat16 {
    uint16_t bits;
};

inline Floats load(const float* p) {
    Floats v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

inline Floats load(const bfloat16* p) {
    Halves halves;
    std::memcpy(&halves, p, sizeof halves);
    return (Floats)(__builtin_convertvector(halves, Words) << 16);
}

inline void store(float* p, Floats v) { std::memcpy(p, &v, sizeof v); }

// Rounds to the nearest, ties to even; what is not a number stays so.
inline void store(bfloat16* p, Floats v) {
    Words bits = (Words)v;
    Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    Words quiet = (bits >> 16) | 0x40;
    Halves halves = __builtin_convertvector(v == v ? rounded : quiet, Halves);
    std::memcpy(p, &halves, sizeof halves);
}

inline Floats positive(Floats v) { return v > 0 ? v : Floats{}; }

struct Range {
    long begin, end;
};

// Calls work(block, rows) for this thread's share of the blocks, forwards or backwards: what was
// read last is read again first, while it is in the cache.
template <class Work>
void each_block(long rows, int threads, bool backwards, Work work) {
    const long blocks = (rows + BLOCK - 1) / BLOCK;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int thread = 0; thread < threads; ++thread) {
        const long first = blocks * thread / threads, last = blocks * (thread + 1) / threads;
        for (long index = first; index < last; ++index) {
            const long block = backwards ? last - 1 - (index - first) : index;
            work(block, Range{block * BLOCK, block * BLOCK + BLOCK < rows ? block * BLOCK + BLOCK : rows});
        }
    }
}

// The two sums over the rows of a block, of `terms(row offset, channel) -> (a, b)`, for every channel.
template <int VECTORS, class Terms>
inline void sum_group(Range rows, long channels, long group, Terms terms, float* a_out, float* b_out) {
    constexpr int UNROLL = VECTORS == 1 ? 4 : VECTORS == 2 ? 2 : 1;  // independent chains of additions
    Floats a[UNROLL][VECTORS] = {}, b[UNROLL][VECTORS] = {};
    long row = rows.begin;
    for (; row + UNROLL <= rows.end; row += UNROLL)
        for (int u = 0; u < UNROLL; ++u)
            for (int v = 0; v < VECTORS; ++v)
                terms((row + u) * channels + group + v * LANES, v, a[u][v], b[u][v]);
    for (; row < rows.end; ++row)
        for (int v = 0; v < VECTORS; ++v)
            terms(row * channels + group + v * LANES, v, a[0][v], b[0][v]);
    for (int v = 0; v < VECTORS; ++v) {
        for (int u = 1; u < UNROLL; ++u) a[0][v] += a[u][v], b[0][v] += b[u][v];
        store(a_out + group + v * LANES, a[0][v]);
        store(b_out + group + v * LANES, b[0][v]);
    }
}

// Runs `body` over groups of channels: as wide as registers allow, with the width known to the compiler.
template <class Body>
inline void each_group(long channels, Body body) {
    long group = 0;
    for (; group + MAX_VECTORS * LANES <= channels; group += MAX_VECTORS * LANES)
        body(std::integral_constant<int, MAX_VECTORS>{}, group);
    for (; group + 2 * LANES <= channels; group += 2 * LANES) body(std::integral_constant<int, 2>{}, group);
    for (; group < channels; group += LANES) body(std::integral_constant<int, 1>{}, group);
}

// Adds the blocks' sums [blocks, 2, channels], in their order.
std::vector<double> total(const std::vector<float>& partial, long blocks, long channels) {
    std::vector<double> sums(2 * channels, 0.0);
    for (long block = 0; block < blocks; ++block)
        for (long i = 0; i < 2 * channels; ++i) sums[i] += partial[block * 2 * channels + i];
    return sums;
}

template <class T>
void forward(const T* x, const T* residual, T* y, const float* weight, const float* bias, float* running_mean,
             float* running_var, float* mean, float* invstd, long rows, long channels, double eps,
             double momentum, bool relu, int threads) {
    const long blocks = (rows + BLOCK - 1) / BLOCK;
    std::vector<float> partial(blocks * 2 * channels), pivot(channels), scale(channels), shift(channels);
    // Differences from the first row keep the sum of squares free of cancellation.
    for (long c = 0; c < channels; c += LANES) store(&pivot[c], load(x + c));
    each_block(rows, threads, false, [&](long block, Range range) {
        float* sums = &partial[block * 2 * channels];
        each_group(channels, [&](auto width, long group) {
            constexpr int VECTORS = width;
            Floats k[VECTORS];
            for (int v = 0; v < VECTORS; ++v) k[v] = load(&pivot[group + v * LANES]);
            auto terms = [&](long at, int v, Floats& a, Floats& b) {
                const Floats difference = load(x + at) - k[v];
                a += difference;
                b += difference * difference;
            };
            sum_group<VECTORS>(range, channels, group, terms, sums, sums + channels);
        });
    });
    const std::vector<double> sums = total(partial, blocks, channels);
    for (long c = 0; c < channels; ++c) {
        const double offset = sums[c] / rows, average = pivot[c] + offset;
        double variance = sums[channels + c] / rows - offset * offset;
        variance = variance < 0 ? 0 : variance;
        const double inverse = 1 / std::sqrt(variance + eps);
        mean[c] = average;
        invstd[c] = inverse;
        scale[c] = weight[c] * inverse;
        shift[c] = bias[c] - average * weight[c] * inverse;
        running_mean[c] = (1 - momentum) * running_mean[c] + momentum * average;
        running_var[c] = (1 - momentum) * running_var[c] + momentum * variance * rows / (rows - 1);
    }
    each_block(rows, threads, true, [&](long, Range range) {
        each_group(channels, [&](auto width, long group) {
            constexpr int VECTORS = width;
            Floats a[VECTORS], b[VECTORS];
            for (int v = 0; v < VECTORS; ++v) {
                a[v] = load(&scale[group + v * LANES]);
                b[v] = load(&shift[group + v * LANES]);
            }
            for (long row = range.begin; row < range.end; ++row)
                for (int v = 0; v < VECTORS; ++v) {
                    const long at = row * channels + group + v * LANES;
                    Floats value = load(x + at) * a[v] + b[v];
                    if (residual) value += load(residual + at);
                    store(y + at, relu ? positive(value) : value);
                }
        });
    });
}

template <class T>
void backward(const T* grad_y, const T* x, const T* y, T* grad_x, T* grad_residual, const float* weight,
              const float* mean, const float* invstd, float* grad_weight, float* grad_bias, long rows,
              long channels, int threads) {
    const long blocks = (rows + BLOCK - 1) / BLOCK;
    std::vector<float> partial(blocks * 2 * channels), by_grad(channels), by_x(channels), constant(channels);
    each_block(rows, threads, false, [&](long block, Range range) {
        float* sums = &partial[block * 2 * channels];
        each_group(channels, [&](auto width, long group) {
            constexpr int VECTORS = width;
            Floats m[VECTORS];
            for (int v = 0; v < VECTORS; ++v) m[v] = load(mean + group + v * LANES);
            auto terms = [&](long at, int v, Floats& a, Floats& b) {
                Floats grad = load(grad_y + at);
                if (y) grad = load(y + at) > 0 ? grad : Floats{};
                if (grad_residual) store(grad_residual + at, grad);
                a += grad;
                b += grad * (load(x + at) - m[v]);
            };
            sum_group<VECTORS>(range, channels, group, terms, sums, sums + channels);
        });
    });
    const std::vector<double> sums = total(partial, blocks, channels);
    for (long c = 0; c < channels; ++c) {
        const double inverse = invstd[c], scale = weight[c] * inverse;
        const double slope = -scale * inverse * inverse * sums[channels + c] / rows;
        grad_bias[c] = sums[c];
        grad_weight[c] = sums[channels + c] * inverse;
        by_grad[c] = scale;
        by_x[c] = slope;
        constant[c] = -scale * sums[c] / rows - slope * mean[c];
    }
    const T* source = grad_residual ? grad_residual : grad_y;
    const T* mask = grad_residual ? nullptr : y;
    each_block(rows, threads, true, [&](long, Range range) {
        each_group(channels, [&](auto width, long group) {
            constexpr int VECTORS = width;
            Floats a[VECTORS], b[VECTORS], c[VECTORS];
            for (int v = 0; v < VECTORS; ++v) {
                a[v] = load(&by_grad[group + v * LANES]);
                b[v] = load(&by_x[group + v * LANES]);
                c[v] = load(&constant[group + v * LANES]);
            }
            for (long row = range.begin; row < range.end; ++row)
                for (int v = 0; v < VECTORS; ++v) {
                    const long at = row * channels + group + v * LANES;
                    Floats grad = load(source + at);
                    if (mask) grad = load(mask + at) > 0 ? grad : Floats{};
                    store(grad_x + at, grad * a[v] + load(x + at) * b[v] + c[v]);
                }
        });
    });
}

}  // namespace

// One view each way. Pointers are to the first value; `residual`, `grad_residual` may be null, and `y` in
// backward where there is no ReLU. `mean` and `invstd` are kept for backward; the running statistics take one
// momentum update.
#define PCL_NORM_ACT(T)                                                                                          \
    void norm_act_forward_##T(const T* x, const T* residual, T* y, const float* weight, const float* bias,       \
                              float* running_mean, float* running_var, float* mean, float* invstd, long rows,    \
                              long channels, double eps, double momentum, int relu, int threads) {               \
        forward(x, residual, y, weight, bias, running_mean, running_var, mean, invstd, rows, channels, eps,      \
                momentum, relu, threads);                                                                        \
    }                                                                                                            \
    void norm_act_backward_##T(const T* grad_y, const T* x, const T* y, T* grad_x, T* grad_residual,             \
                               const float* weight, const float* mean, const float* invstd, float* grad_weight,  \
                               float* grad_bias, long rows, long channels, int threads) {                        \
        backward(grad_y, x, y, grad_x, grad_residual, weight, mean, invstd, grad_weight, grad_bias, rows,        \
                 channels, threads);                                                                             \
    }

extern "C" {
PCL_NORM_ACT(float)
PCL_NORM_ACT(bfloat16)
}
