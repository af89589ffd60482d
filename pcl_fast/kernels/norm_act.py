"""Training BatchNorm with an optional residual and ReLU in two passes over memory: the CPU's, in C++.

torch runs BatchNorm, addition and ReLU one after the other, each over the whole tensor; on a CPU that is
memory-bound and takes a third of a training step.
"""

import ctypes
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from pcl_fast import native

SOURCE = Path(__file__).with_suffix(".cpp")
LANES = 16
SUFFIXES = {torch.float32: "float", torch.bfloat16: "bfloat16"}

POINTER, SIZES = ctypes.c_void_p, (ctypes.c_long,) * 3
FORWARD = (*(POINTER,) * 9, ctypes.c_double, ctypes.c_double, *SIZES, ctypes.c_int, ctypes.c_int)
BACKWARD = (*(POINTER,) * 10, *SIZES, ctypes.c_int)


@dataclass(frozen=True, slots=True)
class NormState:
    """A BatchNorm2d: weight, bias, running mean and variance [C] in float32, and its numbers."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    momentum: float
    eps: float


def norm_act(x: Tensor, state: NormState, residual: Tensor | None, relu: bool, views: int = 1) -> Tensor:
    """relu(BatchNorm(x) + residual), each of the `views` stacked along the batch by its own statistics.

    x and residual [V * B, C, H, W]; `takes` must hold. Sums are float32 and float64, and only the result is
    rounded to the type of x. The running statistics take one momentum update a view, in view order.
    """
    return _NormAct.apply(x, state.weight, state.bias, residual, (state, relu, views))  # pyright: ignore


def reference(x: Tensor, state: NormState, residual: Tensor | None, relu: bool, views: int = 1) -> Tensor:
    """The same in plain torch, one operation after the other."""
    buffers = state.running_mean, state.running_var
    outs = [
        F.batch_norm(view, *buffers, state.weight, state.bias, True, state.momentum, state.eps)
        for view in x.chunk(views)
    ]
    out = torch.cat(outs) if residual is None else torch.cat(outs) + residual
    return out.relu() if relu else out


def takes(x: Tensor, weight: Tensor | None, residual: Tensor | None) -> bool:
    """Whether the kernel can be used: a CPU tensor in channels-last order, of a multiple of 16 channels."""
    fits = _fits(x) and x.shape[1] % LANES == 0 and weight is not None and weight.dtype == torch.float32
    return (
        fits
        and (residual is None or (_fits(residual) and residual.dtype == x.dtype))
        and (native.why_unavailable(SOURCE) is None)
    )


def _fits(x: Tensor) -> bool:
    known = x.device.type == "cpu" and x.dtype in SUFFIXES and x.ndim == 4
    return known and x.is_contiguous(memory_format=torch.channels_last)


def pointers(*tensors: Tensor | None) -> list[int | None]:
    """Where the tensors begin, null for None."""
    return [None if tensor is None else tensor.data_ptr() for tensor in tensors]


def sum_views(gradients: Tensor) -> Tensor:
    """The sum of [V, ...] over the views."""
    return gradients[0] if len(gradients) == 1 else gradients.sum(0)


class _NormAct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, options: Any
    ) -> Tensor:
        state, relu, views = options
        channels = x.shape[1]
        y, mean_VC = torch.empty_like(x), weight.new_empty(views, channels)
        invstd_VC = torch.empty_like(mean_VC)
        run = native.function(SOURCE, f"norm_act_forward_{SUFFIXES[x.dtype]}", FORWARD)
        kept = (weight, bias, state.running_mean, state.running_var, mean_VC, invstd_VC)
        sizes = (views, x.numel() // channels // views, channels)
        run(
            *pointers(x, residual, y, *kept), state.eps, state.momentum, *sizes, relu, torch.get_num_threads()
        )
        ctx.save_for_backward(x, y if relu else None, weight, mean_VC, invstd_VC)
        ctx.has_residual = residual is not None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        x, y, weight, mean_VC, invstd_VC = ctx.saved_tensors
        views, channels = mean_VC.shape
        grad_y = grad_y.to(x.dtype).contiguous(memory_format=torch.channels_last)
        grad_x = torch.empty_like(x)
        # Without a ReLU the residual's gradient is y's own.
        masked = ctx.has_residual and y is not None
        grad_residual = torch.empty_like(x) if masked else grad_y if ctx.has_residual else None
        grad_weight_VC, grad_bias_VC = torch.empty_like(mean_VC), torch.empty_like(mean_VC)
        run = native.function(SOURCE, f"norm_act_backward_{SUFFIXES[x.dtype]}", BACKWARD)
        big = (grad_y, x, y, grad_x, grad_residual if masked else None)
        sizes = (views, x.numel() // channels // views, channels)
        small = (weight, mean_VC, invstd_VC, grad_weight_VC, grad_bias_VC)
        run(*pointers(*big, *small), *sizes, torch.get_num_threads())
        return grad_x, sum_views(grad_weight_VC), sum_views(grad_bias_VC), grad_residual, None
