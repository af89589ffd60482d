"""Training BatchNorm with an optional residual and ReLU in two passes over memory.

torch runs BatchNorm, addition and ReLU one after the other, each over the whole tensor; they are bound by
memory, and on a CPU take a third of a training step. Ours are in C++ for the CPU (norm_act.cpp, called from
here) and in Triton for CUDA (norm_act_triton.py).
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from pcl_fast import native
from pcl_fast.device import has_triton

SOURCE = Path(__file__).with_suffix(".cpp")
LANES = 16
SUFFIXES = {torch.float32: "float", torch.bfloat16: "bfloat16"}
TYPES = {"cpu": tuple(SUFFIXES), "cuda": (torch.float32, torch.bfloat16, torch.float16)}

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


@dataclass(frozen=True, slots=True)
class Saved:
    """What backward reads: the input, the output where there is a ReLU, and each view's statistics [V, C]."""

    x: Tensor
    y: Tensor | None
    weight: Tensor
    mean_VC: Tensor
    invstd_VC: Tensor


@dataclass(frozen=True, slots=True)
class Gradients:
    """Of x and, where asked for, of the residual, in the type of x; of weight and bias [C] in float32."""

    x: Tensor
    residual: Tensor | None
    weight: Tensor
    bias: Tensor


@dataclass(frozen=True, slots=True)
class Kernels:
    """One way to do it.

    `forward(x, residual, state, relu, views)` gives y, mean_VC and invstd_VC, and updates the running
    statistics; `backward(grad_y, saved, masked)` the gradients, with `masked` also that behind the ReLU: the
    residual's.
    """

    forward: Callable[[Tensor, Tensor | None, NormState, bool, int], tuple[Tensor, Tensor, Tensor]]
    backward: Callable[[Tensor, Saved, bool], Gradients]


def norm_act(
    x: Tensor,
    state: NormState,
    residual: Tensor | None,
    relu: bool,
    views: int = 1,
    kernels: Kernels | None = None,
) -> Tensor:
    """relu(BatchNorm(x) + residual), each of the `views` stacked along the batch by its own statistics.

    x and residual [V * B, C, H, W]; `takes` must hold. Sums are float32 or more, and only the result is
    rounded to the type of x. The running statistics take one momentum update a view, in view order. `kernels`
    are by default those for the device of x.
    """
    options = (state, relu, views, kernels or _kernels_for(x))
    return _NormAct.apply(x, state.weight, state.bias, residual, options)  # pyright: ignore


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
    """Whether there is a kernel: for channels-last tensors; on the CPU, of a multiple of 16 channels."""
    if weight is None or weight.dtype != torch.float32 or weight.device != x.device or not _fits(x):
        return False
    if residual is not None:
        same = (residual.shape, residual.dtype, residual.device) == (x.shape, x.dtype, x.device)
        if not same or not _fits(residual):
            return False
    if x.device.type == "cpu":
        return x.shape[1] % LANES == 0 and native.why_unavailable(SOURCE) is None
    # Triton launches on the current device only.
    return has_triton() and x.device.index == torch.cuda.current_device()


def _fits(x: Tensor) -> bool:
    known = x.dtype in TYPES.get(x.device.type, ()) and x.ndim == 4
    return known and x.is_contiguous(memory_format=torch.channels_last)


def _kernels_for(x: Tensor) -> Kernels:
    if x.device.type == "cpu":
        return CPP
    from pcl_fast.kernels.norm_act_triton import TRITON

    return TRITON


class _NormAct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, options: Any
    ) -> Tensor:
        state, relu, views, kernels = options
        y, mean_VC, invstd_VC = kernels.forward(x, residual, state, relu, views)
        ctx.save_for_backward(x, y if relu else None, weight, mean_VC, invstd_VC)
        ctx.backward_kernel, ctx.has_residual = kernels.backward, residual is not None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        saved = Saved(*ctx.saved_tensors)
        grad_y = grad_y.to(saved.x.dtype).contiguous(memory_format=torch.channels_last)
        # Without a ReLU the residual's gradient is y's own.
        masked = ctx.has_residual and saved.y is not None
        grads = ctx.backward_kernel(grad_y, saved, masked)
        grad_residual = grads.residual if masked else grad_y if ctx.has_residual else None
        return grads.x, grads.weight, grads.bias, grad_residual, None


def _forward_cpp(
    x: Tensor, residual: Tensor | None, state: NormState, relu: bool, views: int
) -> tuple[Tensor, Tensor, Tensor]:
    channels = x.shape[1]
    y, mean_VC = torch.empty_like(x), state.weight.new_empty(views, channels)
    invstd_VC = torch.empty_like(mean_VC)
    run = native.function(SOURCE, f"norm_act_forward_{SUFFIXES[x.dtype]}", FORWARD)
    kept = (state.weight, state.bias, state.running_mean, state.running_var, mean_VC, invstd_VC)
    sizes = (views, x.numel() // channels // views, channels)
    run(*pointers(x, residual, y, *kept), state.eps, state.momentum, *sizes, relu, torch.get_num_threads())
    return y, mean_VC, invstd_VC


def _backward_cpp(grad_y: Tensor, saved: Saved, masked: bool) -> Gradients:
    x, (views, channels) = saved.x, saved.mean_VC.shape
    grad_x, grad_residual = torch.empty_like(x), torch.empty_like(x) if masked else None
    grad_weight_VC, grad_bias_VC = torch.empty_like(saved.mean_VC), torch.empty_like(saved.mean_VC)
    run = native.function(SOURCE, f"norm_act_backward_{SUFFIXES[x.dtype]}", BACKWARD)
    big = (grad_y, x, saved.y, grad_x, grad_residual)
    small = (saved.weight, saved.mean_VC, saved.invstd_VC, grad_weight_VC, grad_bias_VC)
    sizes = (views, x.numel() // channels // views, channels)
    run(*pointers(*big, *small), *sizes, torch.get_num_threads())
    return Gradients(grad_x, grad_residual, sum_views(grad_weight_VC), sum_views(grad_bias_VC))


def pointers(*tensors: Tensor | None) -> list[int | None]:
    """Where the tensors begin, null for None."""
    return [None if tensor is None else tensor.data_ptr() for tensor in tensors]


def sum_views(gradients: Tensor) -> Tensor:
    """The sum of [V, ...] over the views."""
    return gradients[0] if len(gradients) == 1 else gradients.sum(0)


CPP = Kernels(_forward_cpp, _backward_cpp)
