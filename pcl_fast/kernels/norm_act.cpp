// BatchNorm in training, with an optional residual and ReLU: norm.h.
//
// `residual` and `grad_residual` may be null, and `y` in backward where there is no ReLU. `mean` and `invstd` are
// kept for backward.

#include "norm.h"

namespace {

template <class T>
void forward(const T* x, const T* residual, T* y, const Norm& norm, float* mean, float* invstd, long rows,
             long channels, bool relu, int threads) {
    // Differences from the first row keep the sum of squares free of cancellation.
    std::vector<float> pivot(channels);
    for (long c = 0; c < channels; c += LANES) store(&pivot[c], load(x + c));
    const Sums sums = sum_rows(x, pivot.data(), rows, channels, threads);
    std::vector<float> scale(channels), shift(channels);
    const Line line{mean, invstd, scale.data(), shift.data()};
    find_line(norm, sums, pivot.data(), rows, line);
    normalise(x, residual, y, line, rows, channels, relu, threads);
}

template <class T>
void backward(const T* grad_y, const T* x, const T* y, T* grad_x, T* grad_residual, const float* weight,
              const float* mean, const float* invstd, NormGradients grads, long rows, long channels, int threads) {
    const Gradient<T> gradient = sum_gradients(grad_y, x, Mask<T>{y, nullptr}, grad_residual, weight, mean, invstd,
                                               grads, rows, channels, threads);
    each_block(rows, threads, true, [&](long, Range range) {
        for (long row = range.begin; row < range.end; ++row)
            for (long c = 0; c < channels; c += LANES)
                store(grad_x + row * channels + c, gradient.at(row * channels + c, c));
    });
}

}  // namespace

// `views` batches of `rows` lie one after the other, each with its own statistics: mean, invstd and the gradients
// of parameters are [views, channels].
#define PCL_NORM_ACT(T)                                                                                          \
    void norm_act_forward_##T(const T* x, const T* residual, T* y, const float* weight, const float* bias,       \
                              float* running_mean, float* running_var, float* mean, float* invstd, double eps,   \
                              double momentum, long views, long rows, long channels, int relu, int threads) {    \
        const Norm norm{weight, bias, running_mean, running_var, eps, momentum};                                 \
        for (long v = 0, at = 0; v < views; ++v, at += rows * channels)                                          \
            forward(x + at, residual ? residual + at : nullptr, y + at, norm, mean + v * channels,               \
                    invstd + v * channels, rows, channels, relu, threads);                                       \
    }                                                                                                            \
    void norm_act_backward_##T(const T* grad_y, const T* x, const T* y, T* grad_x, T* grad_residual,             \
                               const float* weight, const float* mean, const float* invstd, float* grad_weight,  \
                               float* grad_bias, long views, long rows, long channels, int threads) {            \
        for (long v = 0, at = 0; v < views; ++v, at += rows * channels)                                          \
            backward(grad_y + at, x + at, y ? y + at : nullptr, grad_x + at,                                     \
                     grad_residual ? grad_residual + at : nullptr, weight, mean + v * channels,                  \
                     invstd + v * channels, {grad_weight + v * channels, grad_bias + v * channels}, rows,        \
                     channels, threads);                                                                         \
    }

extern "C" {
PCL_NORM_ACT(float)
PCL_NORM_ACT(bfloat16)
}
