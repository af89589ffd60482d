// Training BatchNorm over channels-last rows, in pieces.
//
//   y = relu((x - mean) / sqrt(var + eps) * weight + bias + residual)
//
// A tensor [B, C, H, W] in channels-last order is a matrix of B * H * W rows of C values; C is a multiple of
// 16. Values are bfloat16 or float32, sums and parameters float32, totals double. Rows are summed in parts of
// fixed size and the parts added in order, so the result does not depend on the number of threads.

#pragma once

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

constexpr int LANES = 16;

struct bfloat16 {
    uint16_t bits;
};

// A BatchNorm's parameters, running statistics and numbers.
struct Norm {
    const float *weight, *bias;
    float *running_mean, *running_var;
    double eps, momentum;
};

namespace {

constexpr int MAX_VECTORS = 4;  // vectors of channels summed in registers at a time
constexpr long BLOCK = 256;     // rows

typedef float Floats __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES), aligned(2)));

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

// Rounds to the nearest, ties to even; what is not a number stays so. (The instruction, where there is one, takes
// numbers below 1e-38 for zero.)
inline void store(bfloat16* p, Floats v) {
#ifdef __AVX512BF16__
    const __m256bh halves = _mm512_cvtneps_pbh((__m512)v);
#else
    const Words bits = (Words)v;
    const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const Words quiet = (bits >> 16) | 0x40;
    const Halves halves = __builtin_convertvector(v == v ? rounded : quiet, Halves);
#endif
    std::memcpy((void*)p, &halves, sizeof halves);
}

inline Floats where_positive(Floats mask, Floats v) { return mask > 0 ? v : Floats{}; }

// What is not a number stays so, as in torch: a ReLU must not hide it from the losses.
inline Floats relu_of(Floats v) { return v < 0 ? Floats{} : v; }

struct Range {
    long begin, end;
};

// Calls work(block, rows) for every block of rows; backwards where what was read last is to be read again first,
// while it is in the cache. A thread that is faster than the others does more.
template <class Work>
void each_block(long rows, int threads, bool backwards, Work work) {
    const long blocks = (rows + BLOCK - 1) / BLOCK;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 16)
    for (long index = 0; index < blocks; ++index) {
        const long block = backwards ? blocks - 1 - index : index;
        work(block, Range{block * BLOCK, block * BLOCK + BLOCK < rows ? block * BLOCK + BLOCK : rows});
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

// Two sums over some rows, for each channel of a group: `terms(offset, vector, a, b)` adds to them.
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
        for (int v = 0; v < VECTORS; ++v) terms(row * channels + group + v * LANES, v, a[0][v], b[0][v]);
    for (int v = 0; v < VECTORS; ++v) {
        for (int u = 1; u < UNROLL; ++u) a[0][v] += a[u][v], b[0][v] += b[u][v];
        store(a_out + group + v * LANES, a[0][v]);
        store(b_out + group + v * LANES, b[0][v]);
    }
}

// Partial sums [parts, 2, channels], each of some rows.
struct Sums {
    long parts, channels;
    std::vector<float> values;
    Sums(long parts, long channels) : parts(parts), channels(channels), values(parts * 2 * channels, 0.0f) {}
    float* part(long index) { return &values[index * 2 * channels]; }
    // The sums of all parts [2, channels], added in their order.
    std::vector<double> total() const {
        std::vector<double> sums(2 * channels, 0.0);
        for (long part = 0; part < parts; ++part)
            for (long i = 0; i < 2 * channels; ++i) sums[i] += values[part * 2 * channels + i];
        return sums;
    }
};

// Two sums over all rows for each channel: `terms(offset, channel, center of the channels there, a, b)` adds to them.
template <class Terms>
Sums sum_blocks(const float* center, long rows, long channels, int threads, Terms terms) {
    Sums sums((rows + BLOCK - 1) / BLOCK, channels);
    each_block(rows, threads, false, [&](long block, Range range) {
        each_group(channels, [&](auto width, long group) {
            constexpr int VECTORS = width;
            Floats c[VECTORS];
            for (int v = 0; v < VECTORS; ++v) c[v] = load(center + group + v * LANES);
            const auto centred = [&](long at, int v, Floats& a, Floats& b) { terms(at, group + v * LANES, c[v], a, b); };
            sum_group<VECTORS>(range, channels, group, centred, sums.part(block), sums.part(block) + channels);
        });
    });
    return sums;
}

// Sums of x - pivot and of its square.
template <class T>
Sums sum_rows(const T* x, const float* pivot, long rows, long channels, int threads) {
    return sum_blocks(pivot, rows, channels, threads, [=](long at, long, const Floats& center, Floats& a, Floats& b) {
        const Floats difference = load(x + at) - center;
        a += difference;
        b += difference * difference;
    });
}

// What BatchNorm found in a batch, and the line that it makes of it: x * scale + shift.
struct Line {
    float *mean, *invstd, *scale, *shift;
    Floats at(Floats x, long channel) const { return x * load(scale + channel) + load(shift + channel); }
};

// A pivot for the sums of channels whose running mean is this. One that is not finite, left by another view's values,
// would make these sums so, too.
inline std::vector<float> pivot_near(const float* running_mean, long channels) {
    std::vector<float> pivot(running_mean, running_mean + channels);
    for (float& value : pivot)
        if (!std::isfinite(value)) value = 0;
    return pivot;
}

// The line from the sums of x - pivot and of its square; one momentum update of the running statistics.
inline void find_line(const Norm& norm, const Sums& partial, const float* pivot, long rows, const Line& line) {
    const std::vector<double> sums = partial.total();
    for (long c = 0; c < partial.channels; ++c) {
        const double offset = sums[c] / rows, average = pivot[c] + offset;
        const double difference = sums[partial.channels + c] / rows - offset * offset;
        const double variance = difference < 0 ? 0 : difference, inverse = 1 / std::sqrt(variance + norm.eps);
        line.mean[c] = average;
        line.invstd[c] = inverse;
        line.scale[c] = norm.weight[c] * inverse;
        line.shift[c] = norm.bias[c] - average * norm.weight[c] * inverse;
        norm.running_mean[c] += norm.momentum * (average - norm.running_mean[c]);
        norm.running_var[c] += norm.momentum * (variance * rows / (rows - 1) - norm.running_var[c]);
    }
}

// y = relu(line(x) + residual)
template <class T>
void normalise(const T* x, const T* residual, T* y, const Line& line, long rows, long channels, bool relu,
               int threads) {
    each_block(rows, threads, true, [&](long, Range range) {
        each_group(channels, [&](auto width, long group) {
            constexpr int VECTORS = width;
            Floats a[VECTORS], b[VECTORS];
            for (int v = 0; v < VECTORS; ++v) {
                a[v] = load(&line.scale[group + v * LANES]);
                b[v] = load(&line.shift[group + v * LANES]);
            }
            for (long row = range.begin; row < range.end; ++row)
                for (int v = 0; v < VECTORS; ++v) {
                    const long at = row * channels + group + v * LANES;
                    Floats value = load(x + at) * a[v] + b[v];
                    if (residual) value += load(residual + at);
                    store(y + at, relu ? relu_of(value) : value);
                }
        });
    });
}

// Which gradients pass a ReLU: those where its output y is positive, or the line through its input x; or all.
template <class T>
struct Mask {
    const T* y;
    const Line* line;
    Floats cut(Floats grad, Floats x, long at, long channel) const {
        if (y) return where_positive(load(y + at), grad);
        return line ? where_positive(line->at(x, channel), grad) : grad;
    }
};

// The gradient of x as grad * scale + x * slope + constant, `grad` being cut off by `mask`.
template <class T>
struct Gradient {
    const T *grad, *x;
    Mask<T> mask;
    std::vector<float> scale, slope, constant;
    Floats at(long at, long channel) const {
        const Floats value = load(x + at), cut = mask.cut(load(grad + at), value, at, channel);
        return cut * load(&scale[channel]) + value * load(&slope[channel]) + load(&constant[channel]);
    }
};

// Where the gradients of a BatchNorm's parameters go.
struct NormGradients {
    float *weight, *bias;
};

// What remains to be done for the gradient of x, from the sums of the gradients behind the mask and of their
// products with x - mean; and the gradients of weight and bias.
template <class T>
Gradient<T> find_gradient(const T* grad, const T* x, Mask<T> mask, const Sums& partial, const float* weight,
                          const float* mean, const float* invstd, NormGradients out, long rows) {
    const std::vector<double> sums = partial.total();
    const long channels = partial.channels;
    Gradient<T> gradient{grad, x, mask, {}, {}, {}};
    gradient.scale.resize(channels), gradient.slope.resize(channels), gradient.constant.resize(channels);
    for (long c = 0; c < channels; ++c) {
        const double inverse = invstd[c], scale = weight[c] * inverse;
        const double slope = -scale * inverse * inverse * sums[channels + c] / rows;
        out.bias[c] = sums[c];
        out.weight[c] = sums[channels + c] * inverse;
        gradient.scale[c] = scale;
        gradient.slope[c] = slope;
        gradient.constant[c] = -scale * sums[c] / rows - slope * mean[c];
    }
    return gradient;
}

// The same with the sums taken here; writes the gradient behind the mask to `grad_residual`, if that is not null.
template <class T>
Gradient<T> sum_gradients(const T* grad_y, const T* x, Mask<T> mask, T* grad_residual, const float* weight,
                          const float* mean, const float* invstd, NormGradients out, long rows, long channels,
                          int threads) {
    const auto terms = [=](long at, long channel, const Floats& center, Floats& a, Floats& b) {
        const Floats value = load(x + at), grad = mask.cut(load(grad_y + at), value, at, channel);
        if (grad_residual) store(grad_residual + at, grad);
        a += grad;
        b += grad * (value - center);
    };
    const Sums sums = sum_blocks(mean, rows, channels, threads, terms);
    const T* grad = grad_residual ? grad_residual : grad_y;
    return find_gradient(grad, x, grad_residual ? Mask<T>{} : mask, sums, weight, mean, invstd, out, rows);
}

}  // namespace
