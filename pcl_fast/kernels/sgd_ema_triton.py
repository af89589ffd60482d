"""SGD, the mean teachers' average and both bfloat16 copies in one pass over flat buffers, in Triton.

A program updates BLOCK weights. All numbers that change from step to step are read on the device, nothing
synchronises, and the grid depends on the number of weights only, so this can be captured in a CUDA graph.
"""
# Kernels take pointers, which have no types and are many.
# pyright: basic, reportGeneralTypeIssues=false, reportCallIssue=false
# ruff: noqa: PLR0913, PLR0917

import torch
import triton
import triton.language as tl
from torch import Tensor

from pcl_fast.kernels.sgd_ema import FlatBuffers, SgdRule

# Four neighbouring weights a thread: one 16-byte access, the widest, of every float32 buffer, and 8 bytes of
# a bfloat16 one. With 32 registers a multiprocessor holds all its 2,048 threads, each with four such loads
# under way: 128 KiB, several times what hides the latency of memory. Eight weights a thread give the compiler
# one layout for loads and another for stores: it then takes every result through shared memory.
WARPS = 8
BLOCK = 4 * 32 * WARPS


def sgd_ema_triton(buffers: FlatBuffers, rule: SgdRule, lr: Tensor, phi: Tensor, stop: Tensor) -> None:
    """What `sgd_ema.sgd_ema` does, in float32, in one launch."""
    values, averages = buffers.values, buffers.averages
    assert values.dtype == torch.float32, values.dtype
    count = values.numel()
    if count == 0:
        return
    _update[(triton.cdiv(count, BLOCK),)](
        values, buffers.gradients, buffers.momentum, averages,
        _bits(buffers.half_values), _bits(buffers.half_averages),
        lr, phi, stop, count, rule.momentum, rule.weight_decay,
        NESTEROV=rule.nesterov, MOVES=rule.momentum > 0, BLOCK=BLOCK, num_warps=WARPS, enable_fp_fusion=True,
    )  # fmt: skip


def _bits(half: Tensor | None) -> Tensor | None:
    return None if half is None else half.view(torch.int16)


@triton.jit
def _update(
    values, gradients, momentum, averages, half_values, half_averages,
    lr, phi, stop, count, mu, decay,
    NESTEROV: tl.constexpr, MOVES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK weights; only the last program has a mask, which would keep accesses narrow."""
    if tl.load(stop) > 0:
        return
    rate, keep = tl.load(lr).to(tl.float32), tl.load(phi).to(tl.float32)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    at = start + tl.arange(0, BLOCK)
    buffers = (values, gradients, momentum, averages, half_values, half_averages)
    if start + BLOCK <= count:
        _advance(buffers, at, None, rate, keep, mu, decay, NESTEROV, MOVES)
    else:
        _advance(buffers, at, at < count, rate, keep, mu, decay, NESTEROV, MOVES)


@triton.jit
def _advance(buffers, at, known, rate, keep, mu, decay, NESTEROV: tl.constexpr, MOVES: tl.constexpr):
    values, gradients, momentum, averages, half_values, half_averages = buffers
    # All loads come first: the compiler moves none of them over a store, which might write where it reads.
    value, gradient = tl.load(values + at, mask=known), tl.load(gradients + at, mask=known)
    if MOVES:
        moved = tl.load(momentum + at, mask=known)
    if averages is not None:
        average = tl.load(averages + at, mask=known)
    step = gradient + decay * value
    if MOVES:
        moved = mu * moved + step
        step = step + mu * moved if NESTEROV else moved
        tl.store(momentum + at, moved, mask=known)
    value = value - rate * step
    tl.store(values + at, value, mask=known)
    if half_values is not None:
        tl.store(half_values + at, _rounded(value), mask=known)
    if averages is not None:
        average = keep * average + (1 - keep) * value  # PCL eq. 4
        tl.store(averages + at, average, mask=known)
        if half_averages is not None:
            tl.store(half_averages + at, _rounded(average), mask=known)


@triton.jit
def _rounded(value):
    """The bits of the nearest bfloat16, ties to even, in integers: the same interpreted, which truncates."""
    bits = value.to(tl.uint32, bitcast=True)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where(value == value, nearest, 0x7FC0).to(tl.int16)  # noqa: PLR0124  # what is not a number
