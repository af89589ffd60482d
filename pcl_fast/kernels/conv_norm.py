"""A 3x3 convolution with its training BatchNorm, residual and ReLU on the CPU: in C++, bfloat16 products.

For the thin layers of CIFAR networks. oneDNN, which torch calls, reaches about half of the processor's peak
in their weight gradient; and BatchNorm on its own reads and writes every tensor several times more.
"""

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pcl_fast import native
from pcl_fast.kernels.norm_act import NormState, pointers, sum_views

SOURCE = Path(__file__).with_suffix(".cpp")
PICTURE = 3  # channels of an image, which comes in float32
CHANNELS = (16, 32, 64)  # the kernel knows these at compile time

POINTER, SIZES = ctypes.c_void_p, (ctypes.c_long,) * 7
FORWARD = (*(POINTER,) * 11, ctypes.c_double, ctypes.c_double, *SIZES, ctypes.c_int, ctypes.c_int)
BACKWARD = (*(POINTER,) * 13, *SIZES, ctypes.c_int)


@dataclass(frozen=True, slots=True)
class ConvState:
    """A convolution of kernel 3 and padding 1: weight [O, I, 3, 3] in float32, and its stride, 1 or 2."""

    weight: Tensor
    stride: int = 1


def conv_norm_act(
    x: Tensor, conv: ConvState, norm: NormState, residual: Tensor | None, relu: bool, views: int = 1
) -> Tensor:
    """relu(BatchNorm(conv(x)) + residual), each of the `views` stacked along the batch by its own statistics.

    x [V * B, I, H, W] in bfloat16 (float32 for 3 channels), residual and result [V * B, O, H / s, W / s] in
    bfloat16, all channels-last; `takes` must hold. Weights are rounded to bfloat16 and products summed in
    float32, as under autocast; the gradients of parameters stay float32. A picture of 3 channels gets none.
    """
    options = (norm, relu, views, conv.stride)
    if torch.is_grad_enabled():
        tensors = (x, conv.weight, norm.weight, norm.bias, residual)
        return _ConvNormAct.apply(*tensors, options)  # pyright: ignore[reportReturnType]
    return _forward(x, conv.weight, residual, options, keep=False)[1]


def takes(x: Tensor, conv: ConvState, norm_weight: Tensor | None, residual: Tensor | None) -> bool:
    """Whether the kernel can be used: 16, 32 or 64 channels; results 8, 16, ... wide, an even number high."""
    weight, stride = conv.weight, conv.stride
    dtype = torch.float32 if x.shape[1] == PICTURE else torch.bfloat16
    picture_wants_gradient = x.shape[1] == PICTURE and x.requires_grad
    if x.device.type != "cpu" or x.ndim != 4 or x.dtype != dtype or picture_wants_gradient:
        return False
    if weight.dtype != torch.float32 or norm_weight is None or norm_weight.dtype != torch.float32:
        return False
    if weight.shape[2:] != (3, 3):
        return False
    last = torch.channels_last
    in_order = x.is_contiguous(memory_format=last) and weight.is_contiguous(memory_format=last)
    if residual is not None:
        in_order &= residual.dtype == torch.bfloat16 and residual.is_contiguous(memory_format=last)
    divides = x.shape[2] % (2 * stride) == 0 and x.shape[3] % (8 * stride) == 0 and x.numel() > 0
    return in_order and divides and fits(x.shape[1], weight.shape[0]) and why_unavailable() is None


def fits(in_channels: int, out_channels: int) -> bool:
    """Whether the kernel knows these numbers of channels."""
    return in_channels in (PICTURE, *CHANNELS) and out_channels in CHANNELS


@functools.cache
def why_unavailable() -> str | None:
    """The reason, in one line, why the kernel cannot be had here."""
    if not torch.cpu._is_avx512_bf16_supported():  # pyright: ignore[reportPrivateUsage]
        return "conv_norm: this processor has no AVX512-BF16"
    return native.why_unavailable(SOURCE)


def _forward(
    x: Tensor, weight: Tensor, residual: Tensor | None, options: Any, keep: bool
) -> tuple[Tensor, ...]:
    """z, y, mean and invstd [V, O]; with `keep` off, y in the place of z."""
    norm, relu, views, stride = options
    images, ins, height, width = x.shape
    outs = weight.shape[0]
    shape = (images, outs, height // stride, width // stride)
    z = torch.empty(shape, dtype=torch.bfloat16, memory_format=torch.channels_last)
    y = torch.empty_like(z) if keep else z
    mean_VC, invstd_VC = weight.new_empty(views, outs), weight.new_empty(views, outs)
    run = native.function(SOURCE, "conv_norm_forward", FORWARD)
    parameters = (norm.weight, norm.bias, norm.running_mean, norm.running_var, mean_VC, invstd_VC)
    sizes = (views, images // views, height, width, ins, outs, stride)
    tensors = pointers(x, weight, residual, z, y, *parameters)
    run(*tensors, norm.eps, norm.momentum, *sizes, relu, torch.get_num_threads())
    return z, y, mean_VC, invstd_VC


class _ConvNormAct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        gamma: Tensor,
        _beta: Tensor,
        residual: Tensor | None,
        options: Any,
    ) -> Tensor:
        z, y, mean_VC, invstd_VC = _forward(x, weight, residual, options, keep=True)
        _, relu, ctx.views, ctx.stride = options
        ctx.save_for_backward(x, weight, gamma, z, y if relu else None, mean_VC, invstd_VC)
        ctx.has_residual = residual is not None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        x, weight, gamma, z, y, mean_VC, invstd_VC = ctx.saved_tensors
        views, (images, ins, height, width) = ctx.views, x.shape
        grad_y = grad_y.to(z.dtype).contiguous(memory_format=torch.channels_last)
        grad_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        # Without a ReLU the residual's gradient is y's own.
        masked = ctx.has_residual and y is not None
        grad_residual = torch.empty_like(z) if masked else grad_y if ctx.has_residual else None
        outs, _, *taps = weight.shape
        grad_weight = torch.empty(outs, *taps, ins).permute(0, 3, 1, 2)
        grad_gamma_VC, grad_beta_VC = torch.empty_like(mean_VC), torch.empty_like(mean_VC)
        run = native.function(SOURCE, "conv_norm_backward", BACKWARD)
        sizes = (views, images // views, height, width, ins, outs, ctx.stride)
        big = (grad_y, x, weight, z, y, grad_x, grad_weight, grad_residual if masked else None)
        small = (gamma, mean_VC, invstd_VC, grad_gamma_VC, grad_beta_VC)
        run(*pointers(*big, *small), *sizes, torch.get_num_threads())
        sums = sum_views(grad_gamma_VC), sum_views(grad_beta_VC)
        return grad_x, grad_weight, *sums, grad_residual, None
