"""Training BatchNorm of views stacked along the batch, by torch: by formula, or slice by slice."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

aten = torch.ops.aten


def normalise_by_formula(input: Tensor, norm: nn.BatchNorm2d, views: int) -> Tensor:
    """Normalise in plain operations, differentiable any number of times; updates the running statistics."""
    x_VBCHW = input.unflatten(0, (views, -1))
    x_VBCHW = x_VBCHW.float() if input.dtype in (torch.bfloat16, torch.float16) else x_VBCHW
    var_VC, mean_VC = torch.var_mean(x_VBCHW, dim=(1, 3, 4), correction=0)
    update_running(norm, mean_VC.detach(), var_VC.detach(), x_VBCHW.numel() // mean_VC.numel())
    scale_VC = torch.rsqrt(var_VC + norm.eps)
    if norm.affine:
        scale_VC = scale_VC * norm.weight
    shift_VC = -mean_VC * scale_VC
    if norm.affine:
        shift_VC = shift_VC + norm.bias
    out = x_VBCHW * scale_VC[:, None, :, None, None] + shift_VC[:, None, :, None, None]
    return out.to(input.dtype).flatten(0, 1)


def update_running(norm: nn.BatchNorm2d, mean_VC: Tensor, var_VC: Tensor, values: int | Tensor) -> None:
    """All V momentum updates at once: (1-a)^V r + sum_i a (1-a)^(V-i) s_i, i = 1..V (method.md, section 2).

    `values` is the number of values a channel and view; the running variance is the unbiased one.
    """
    views, rate = len(mean_VC), norm.momentum
    assert rate is not None
    assert norm.running_mean is not None
    assert norm.running_var is not None
    weights = [rate * (1 - rate) ** (views - 1 - index) for index in range(views)]
    unbiased_VC = var_VC * (values / (values - 1))
    with torch.no_grad():
        for running_C, seen_VC in ((norm.running_mean, mean_VC), (norm.running_var, unbiased_VC)):
            step = sum(weight * seen_VC[index] for index, weight in enumerate(weights))
            running_C.mul_((1 - rate) ** views).add_(step)


def normalise_slices(input: Tensor, norm: nn.BatchNorm2d, views: int) -> Tensor:
    """Normalise by torch's kernels, each view on its slice of the batch; `has_kernel` must hold."""
    settings = (norm.running_mean, norm.running_var, norm.momentum, norm.eps, views)
    return _NormaliseSlices.apply(input, norm.weight, norm.bias, settings)  # pyright: ignore


def has_kernel(x: Tensor, weight: Tensor | None) -> bool:
    """Whether torch has BatchNorm kernels that can be called on a slice: CPU and CUDA tensors."""
    known_weight = weight is None or weight.dtype in (torch.float32, torch.float64)
    return x.device.type in ("cpu", "cuda") and known_weight


class _NormaliseSlices(torch.autograd.Function):
    """torch's BatchNorm kernels, called for each view on its contiguous slice of the batch."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, settings: Any) -> Tensor:
        running_mean, running_var, momentum, eps, views = settings
        out = torch.empty_like(x)
        # The kernels save their statistics in at least float32.
        kind = torch.float64 if x.dtype == torch.float64 else torch.float32
        saved_2VC = torch.empty(2, views, x.shape[1], dtype=kind, device=x.device)
        for index, (x_view, out_view) in enumerate(zip(x.chunk(views), out.chunk(views), strict=True)):
            buffers = {"out": out_view, "save_mean": saved_2VC[0, index], "save_invstd": saved_2VC[1, index]}
            aten.native_batch_norm.out(
                x_view, weight, bias, running_mean, running_var, True, momentum, eps, **buffers
            )
        ctx.save_for_backward(x, weight, saved_2VC)
        ctx.eps, ctx.views = eps, views
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        x, weight, saved_2VC = ctx.saved_tensors
        grad_x = torch.empty_like(x)
        wanted = [True, weight is not None, weight is not None]
        grad_weight = grad_bias = None
        slices = list(zip(grad.chunk(ctx.views), x.chunk(ctx.views), grad_x.chunk(ctx.views), strict=True))
        for index in reversed(range(ctx.views)):  # autograd's own order, so that sums round alike
            grad_view, x_view, grad_x_view = slices[index]
            mean, invstd = saved_2VC[0, index], saved_2VC[1, index]
            of_x, of_weight, of_bias = aten.native_batch_norm_backward(
                grad_view, x_view, weight, None, None, mean, invstd, True, ctx.eps, wanted
            )
            grad_x_view.copy_(of_x)
            if weight is not None:
                grad_weight = of_weight if grad_weight is None else grad_weight + of_weight
                grad_bias = of_bias if grad_bias is None else grad_bias + of_bias
        return grad_x, grad_weight, grad_bias, None
