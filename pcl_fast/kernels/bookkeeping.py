"""What a step keeps books of, in a launch each: schedules looked up, values watched, sums added to.

In plain torch these are some thirty launches on a handful of numbers: on a GPU as much time as many a layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pcl_fast.device import has_triton


@dataclass(frozen=True, slots=True)
class Latch:
    """The first bad step: which of n values were not finite in it, bool [n], and its number, int64 []."""

    bad: Tensor
    step: Tensor


def look_up(step: Tensor, by_epoch: Tensor, by_step: Tensor, steps_per_epoch: int) -> Tensor:
    """What tables say of a step (int64 [], 1 for the first): float64 [rows].

    Each row is a product: of what `by_epoch` [rows, epochs] says of the step's epoch and what `by_step`
    [rows, steps] says of the step, whose last column also stands for all later steps.
    """
    if _takes(step):
        from pcl_fast.kernels.bookkeeping_triton import look_up_triton

        return look_up_triton(step, by_epoch, by_step, steps_per_epoch)
    epoch = (step - 1) // steps_per_epoch
    place = step.clamp(max=by_step.shape[1]) - 1
    found = by_epoch.index_select(1, epoch.view(1)) * by_step.index_select(1, place.view(1))
    return found.flatten()


def watch(values: Sequence[Tensor], latch: Latch, step: int | Tensor) -> Tensor:
    """Latch the first step with a value that is not finite, in place; float32 [], 1 from that step on.

    `values`, tensors of float32 or float64, are looked at one after the other.
    """
    if isinstance(step, Tensor) and _takes(*values):
        from pcl_fast.kernels.bookkeeping_triton import watch_triton

        return watch_triton(values, latch, step)
    flat = torch.cat([value.flatten() for value in values])
    earlier = latch.bad.any()
    bad = torch.where(earlier, latch.bad, ~torch.isfinite(flat))
    latch.step.copy_(torch.where(earlier, latch.step, step))
    latch.bad.copy_(bad)
    return bad.any().float()


def add_up(sums: Sequence[Tensor], means: Sequence[Tensor], counts: Tensor, samples: int) -> None:
    """Add a step to each of `sums`, float64 [width], in place.

    Added are `means`, tensors of float32 or float64, times `samples`, one after the other; then `counts`,
    int64. Products are rounded to float32, if the means are.
    """
    if _takes(*means):
        from pcl_fast.kernels.bookkeeping_triton import add_up_triton

        add_up_triton(sums, means, counts, samples)
        return
    added = torch.cat([mean.flatten() for mean in means]) * samples
    added = torch.cat([added, counts.to(added.dtype)])
    for total in sums:
        total.add_(added)


def _takes(*tensors: Tensor) -> bool:
    return all(tensor.is_cuda for tensor in tensors) and has_triton()
