"""The 3x3 convolution of small CIFAR networks on the CPU, in C++ with the processor's bfloat16 products.

oneDNN, which torch calls, reaches about half of the processor's peak in the weight gradient of thin layers, and
two thirds where there are 16 channels.
"""

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pcl_fast.kernels import native

IN_CHANNELS = (16, 32, 64)  # the kernel knows these at compile time
LANES = 16

POINTERS, SIZES = (ctypes.c_void_p,) * 3, (ctypes.c_long,) * 5


def conv3x3(x: Tensor, weight: Tensor) -> Tensor:
    """The convolution of stride 1 and padding 1, without bias; `takes` must hold.

    x [B, I, H, W] in bfloat16, weight [O, I, 3, 3] in float32, both channels-last; out [B, O, H, W] in
    bfloat16. Weights are rounded to bfloat16 and products summed in float32, as under autocast; the gradient
    of the weight stays float32.
    """
    return _Conv3x3.apply(x, weight)  # pyright: ignore


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernel can be used: channels 16, 32 or 64, images 8, 16, ... wide, an even number high."""
    types = x.device.type == "cpu" and x.dtype == torch.bfloat16 and weight.dtype == torch.float32
    if not types or x.ndim != 4 or not fits(weight.shape[1], weight.shape[0]):
        return False
    last = torch.channels_last
    layouts = x.is_contiguous(memory_format=last) and weight.is_contiguous(memory_format=last)
    return layouts and x.shape[2] % 2 == 0 and x.shape[3] % 8 == 0 and why_unavailable() is None


def fits(in_channels: int, out_channels: int) -> bool:
    """Whether the kernel knows these numbers of channels, in both directions."""
    return in_channels in IN_CHANNELS and out_channels in IN_CHANNELS


@functools.cache
def why_unavailable() -> str | None:
    """The reason, in one line, why the kernel cannot be had here."""
    if not torch.cpu._is_avx512_bf16_supported():  # pyright: ignore[reportPrivateUsage]
        return "conv3x3: this processor has no AVX512-BF16"
    return native.why_unavailable("conv3x3")


class _Conv3x3(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _convolve(x, weight, backward=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        x, weight = ctx.saved_tensors
        grad = grad.to(x.dtype).contiguous(memory_format=torch.channels_last)
        wants_x, wants_weight = ctx.needs_input_grad
        grad_x = _convolve(grad, weight, backward=True) if wants_x else None
        return grad_x, _weight_gradient(x, grad, weight) if wants_weight else None


def _convolve(x: Tensor, weight: Tensor, backward: bool) -> Tensor:
    images, ins, height, width = x.shape
    outs = weight.shape[1] if backward else weight.shape[0]
    shape = (images, outs, height, width)
    out = torch.empty(shape, dtype=x.dtype, memory_format=torch.channels_last)
    run = native.function("conv3x3", "conv3x3", (*POINTERS, *SIZES, ctypes.c_int, ctypes.c_int))
    sizes = (images, height, width, ins, outs)
    run(x.data_ptr(), weight.data_ptr(), out.data_ptr(), *sizes, backward, torch.get_num_threads())
    return out


def _weight_gradient(x: Tensor, grad: Tensor, weight: Tensor) -> Tensor:
    images, ins, height, width = x.shape
    out = torch.empty_like(weight)
    run = native.function("conv3x3", "conv3x3_weight_gradient", (*POINTERS, *SIZES, ctypes.c_int))
    sizes = (images, height, width, ins, grad.shape[1])
    run(x.data_ptr(), grad.data_ptr(), out.data_ptr(), *sizes, torch.get_num_threads())
    return out
