"""The books of a step in Triton: one program each, as there are tens of numbers."""
# Kernels take pointers, which have no types and are many.
# pyright: basic, reportGeneralTypeIssues=false, reportCallIssue=false, reportAttributeAccessIssue=false
# pyright: reportOperatorIssue=false
# ruff: noqa: PLR0913, PLR0917

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from pcl_fast.kernels.bookkeeping import Latch


def look_up_triton(step: Tensor, by_epoch: Tensor, by_step: Tensor, steps_per_epoch: int) -> Tensor:
    """What `bookkeeping.look_up` does, in one launch."""
    rows, epochs = by_epoch.shape
    found = by_epoch.new_empty(rows)
    _look_up[(1,)](
        step, by_epoch.contiguous(), by_step.contiguous(), found, steps_per_epoch, epochs, by_step.shape[1],
        ROWS=rows, BLOCK=triton.next_power_of_2(rows), num_warps=1, enable_fp_fusion=True,
    )  # fmt: skip
    return found


def watch_triton(values: Sequence[Tensor], latch: Latch, step: Tensor) -> Tensor:
    """What `bookkeeping.watch` does, in one launch, of one or two tensors."""
    first, second = _two(values)
    stop = torch.empty((), dtype=torch.float32, device=step.device)
    end = first.numel() + _numel(second)
    _watch[(1,)](
        first, second, first.numel(), end, latch.bad.view(torch.uint8), latch.step, step, stop,
        BLOCK=triton.next_power_of_2(end), num_warps=1, enable_fp_fusion=True,
    )  # fmt: skip
    return stop


def add_up_triton(sums: Sequence[Tensor], means: Sequence[Tensor], counts: Tensor, samples: int) -> None:
    """What `bookkeeping.add_up` does, in one launch, of one or two tensors to one or two sums."""
    (first, second), (one, other) = _two(means), _two(sums)
    last = first.numel() + _numel(second)
    _add_up[(1,)](
        one, other, first, second, counts, first.numel(), last, last + counts.numel(), samples,
        BLOCK=triton.next_power_of_2(last + counts.numel()), num_warps=1, enable_fp_fusion=True,
    )  # fmt: skip


def _two(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    assert len(tensors) in (1, 2), len(tensors)
    dense = [tensor.contiguous() for tensor in tensors]
    return dense[0], dense[1] if len(dense) == 2 else None


def _numel(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.numel()


@triton.jit
def _look_up(
    step, by_epoch, by_step, found, steps_per_epoch, epochs, steps, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    number = tl.load(step)
    row = tl.arange(0, BLOCK)
    inside = row < ROWS
    of_epoch = tl.load(by_epoch + row * epochs + (number - 1) // steps_per_epoch, mask=inside)
    of_step = tl.load(by_step + row * steps + tl.minimum(number, steps) - 1, mask=inside)
    tl.store(found + row, of_epoch * of_step, mask=inside)


@triton.jit
def _watch(first, second, middle, end, bad, bad_step, step, stop, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    inside = at < end
    values = _joined(first, second, at, middle, end)
    before = tl.load(bad + at, mask=inside, other=0).to(tl.int32)
    earlier = tl.max(before, 0)
    infinite = tl.where((tl.abs(values) < float("inf")) | (at >= end), 0, 1)
    now = tl.where(earlier > 0, before, infinite)
    tl.debug_barrier()  # all have read what is written next
    tl.store(bad + at, now.to(tl.uint8), mask=inside)
    tl.store(bad_step, tl.where(earlier > 0, tl.load(bad_step), tl.load(step)))
    tl.store(stop, tl.max(now, 0).to(tl.float32))


@triton.jit
def _add_up(one, other, first, second, counts, middle, last, end, samples, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    means = _joined(first, second, at, middle, last) * samples
    right = tl.load(counts + at - last, mask=(at >= last) & (at < end), other=0)
    added = tl.where(at < last, means.to(tl.float64), right.to(tl.float64))
    tl.store(one + at, tl.load(one + at, mask=at < end) + added, mask=at < end)
    if other is not None:
        tl.store(other + at, tl.load(other + at, mask=at < end) + added, mask=at < end)


@triton.jit
def _joined(first, second, at, middle, end):
    """The elements of the first tensor, then those of the second; zero elsewhere."""
    values = tl.load(first + at, mask=at < middle, other=0.0)
    if second is not None:
        more = tl.load(second + at - middle, mask=(at >= middle) & (at < end), other=0.0)
        values = tl.where(at < middle, values, more)
    return values
