"""Training BatchNorm with an optional residual and ReLU on CUDA, in Triton: two kernels each way.

A tensor [V * B, C, H, W] in channels-last order is a matrix [V, rows, C]. The first kernel sums a chunk of
the rows of a view for some channels; the second adds the chunks up, each program for itself (they are few),
and goes over the rows again. Sums are float32 and in fixed order: no atomics, the same bits every time. The
host reads nothing and knows all shapes, so this can be captured in a CUDA graph.

Times that a tensor of this size is read + written: forward 2 + 1, with a residual 3 + 1 (one operation after
the other, with a ReLU: 5 + 3). Backward 4 + 1; with a ReLU 6 + 1; with both 5 + 2, as the first kernel stores
the gradient behind the ReLU, which is the residual's, and the second reads it (one after the other: 6 + 2).
"""
# Triton takes the kernels' constants as plain numbers.
# pyright: reportArgumentType=false

import math
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from pcl_fast.kernels.norm_act import Gradients, Kernels, NormState, Saved
from pcl_fast.kernels.norm_act_jit import find_gradient, normalise, sum_gradients, sum_values

# Bytes of a tensor that a program of 256 threads reads at a time; less where it reads three. Two tiles are on
# their way while one is worked on: with three programs an SM 48 KB, enough to hide the latency of memory.
TILE, GRADIENT_TILE, WARPS = 8192, 4096, 8
# Three an SM of an H200, whose registers they fill. The same elsewhere: the order of sums depends on it.
PROGRAMS = 396
SUMS = 1024  # partial sums read at a time
LINE, SECTOR = 128, 32  # bytes of neighbouring channels that a program reads of a row: at most, at least


@dataclass(frozen=True, slots=True)
class Plan:
    """How programs share [V, rows, C]: each takes `share` rows of a view (a chunk) and `columns` channels."""

    views: int
    rows: int
    channels: int
    columns: int
    share: int
    size: int  # of a value, in bytes

    @property
    def grid(self) -> tuple[int, int, int]:
        """Blocks of channels, which are neighbours in memory, then chunks, then views."""
        blocks = triton.cdiv(self.channels, self.columns)
        return blocks, triton.cdiv(self.rows, self.share), self.views


def make_plan(x: Tensor, views: int) -> Plan:
    """A few programs an SM, but few chunks, as each program reads the sums of all.

    That is 8 * chunks^2 * C bytes a view, from the L2 cache: with at most sqrt(rows / 8) chunks, as much as
    half of x in two bytes. Where that makes too few programs, each takes fewer channels instead.
    """
    channels, size = x.shape[1], x.element_size()
    rows = x.numel() // channels // views
    chunks = max(1, math.isqrt(rows // 8))
    columns = min(triton.next_power_of_2(channels), LINE // size)
    while columns * size > SECTOR and views * triton.cdiv(channels, columns) * chunks < PROGRAMS // 2:
        columns //= 2
    chunks = max(1, min(chunks, PROGRAMS // (views * triton.cdiv(channels, columns))))
    tile = TILE // size // columns
    share = triton.cdiv(triton.cdiv(rows, chunks), tile) * tile
    return Plan(views, rows, channels, columns, share, size)


def forward(
    x: Tensor, residual: Tensor | None, state: NormState, relu: bool, views: int
) -> tuple[Tensor, Tensor, Tensor]:
    """y, mean_VC and invstd_VC; updates the running statistics."""
    plan = make_plan(x, views)
    y = torch.empty_like(x, memory_format=torch.channels_last)
    parts, (mean_VC, invstd_VC) = _new_parts(plan, x), _new_pair(plan, x)
    options = _options(plan, TILE)
    sum_values[plan.grid](x, parts, *_sizes(plan), **options)
    normalise[plan.grid](
        x, residual, y, parts, state.weight, state.bias, state.running_mean, state.running_var,
        mean_VC, invstd_VC, state.momentum, state.eps, *_sizes(plan), RELU=relu, **options,
    )  # fmt: skip
    return y, mean_VC, invstd_VC


def backward(grad_y: Tensor, saved: Saved, masked: bool) -> Gradients:
    """The gradients; with `masked` also what of grad_y passes the ReLU, which is the residual's."""
    x, y = saved.x, saved.y
    plan = make_plan(x, len(saved.mean_VC))
    parts, grad_x = _new_parts(plan, x), torch.empty_like(x, memory_format=torch.channels_last)
    grad_residual = torch.empty_like(grad_x) if masked else None
    grad_weight, grad_bias = torch.empty_like(saved.weight), torch.empty_like(saved.weight)
    options = _options(plan, GRADIENT_TILE)
    sum_gradients[plan.grid](grad_y, x, y, grad_residual, parts, saved.mean_VC, *_sizes(plan), **options)
    if grad_residual is not None:
        grad_y, y = grad_residual, None
    find_gradient[plan.grid](
        grad_y, x, y, grad_x, parts, saved.weight, saved.mean_VC, saved.invstd_VC,
        grad_weight, grad_bias, *_sizes(plan), **options,
    )  # fmt: skip
    return Gradients(grad_x, grad_residual, grad_weight, grad_bias)


TRITON = Kernels(forward, backward)


def _new_parts(plan: Plan, x: Tensor) -> Tensor:
    """Two sums for each view, chunk and channel."""
    _, chunks, views = plan.grid
    return torch.empty((2, views, chunks, plan.channels), dtype=torch.float32, device=x.device)


def _new_pair(plan: Plan, x: Tensor) -> Tensor:
    return torch.empty((2, plan.views, plan.channels), dtype=torch.float32, device=x.device)


def _sizes(plan: Plan) -> tuple[int, int, int]:
    return plan.rows, plan.share, plan.channels // _step(plan)


def _options(plan: Plan, tile: int) -> dict[str, int]:
    rows, chunks = tile // plan.size // plan.columns, SUMS // plan.columns
    shape = {"STEP": _step(plan), "COLUMNS": plan.columns, "ROWS": rows, "CHUNKS": chunks}
    return shape | {"num_warps": WARPS, "enable_fp_fusion": True}


def _step(plan: Plan) -> int:
    """A factor of the number of channels that the compiler is told, so that it reads 16 bytes at a time."""
    return math.gcd(plan.channels, 8)
