// A 3x3 convolution, its training BatchNorm, and an optional residual and ReLU: conv3x3*.h, norm.h.
//
//   out = relu(BatchNorm(conv(in)) + residual)

#include "conv3x3_backward.h"

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
    const std::vector<bfloat16> packed = pack(weight, s, false);
    std::vector<float> scale(outs), shift(outs);
    for (long v = 0; v < views; ++v) {
        const std::vector<float> pivot = pivot_near(running_mean, outs);
        bfloat16* z_of_view = z + v * out_size;
        const Pass pass{packed, z_of_view, pivot.data()};
        const auto run = [&](const auto& from) { return convolve(from, pass, s, threads); };
        const Sums sums = ins == 3 ? run(Plain<float>{(const float*)in + v * in_size})
                                   : run(Plain<bfloat16>{(const bfloat16*)in + v * in_size});
        const Line line{mean + v * outs, invstd + v * outs, scale.data(), shift.data()};
        find_line(norm, sums, pivot.data(), out_size / outs, line);
        normalise(z_of_view, residual ? residual + v * out_size : nullptr, out + v * out_size, line, out_size / outs,
                  outs, relu, threads);
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
        const long at = v * out_size;
        const Gradient<bfloat16> gradient = sum_gradients(
            grad_out + at, z + at, Mask<bfloat16>{out ? out + at : nullptr, nullptr},
            grad_residual ? grad_residual + at : nullptr, norm_weight, mean + v * outs, invstd + v * outs,
            {grad_norm_weight + v * outs, grad_norm_bias + v * outs}, out_size / outs, outs, threads);
        const ConvGradients grads{grad_in ? grad_in + v * in_size : nullptr, grad_weight, v > 0};
        const auto run = [&](const auto& from) {
            convolve_backward(from, weight, gradient, AsItIs{}, grads, s, threads);
        };
        if (ins == 3)
            run(Plain<float>{(const float*)in + v * in_size});
        else
            run(Plain<bfloat16>{(const bfloat16*)in + v * in_size});
    }
}
}
