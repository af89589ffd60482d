"""Training BatchNorm whose statistics are over the batches of all ranks, each view by its own.

Ranks may have different numbers of images, even none. Statistics take two sums over ranks: of values and
their number, which give the mean; then of squared deviations from that mean, so that nothing cancels. The
backward pass takes one. Every rank differentiates the sum of its own images' losses, and weights' gradients
stay its own: whoever adds up all other gradients over ranks adds up these, too.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pcl_fast.models.view_statistics import update_running

SumOverRanks = Callable[[Tensor], None]
IN_VIEW = (1, 3, 4)  # what [V, B, C, H, W] is summed over


def normalise_over_ranks(
    input: Tensor, norm: nn.BatchNorm2d, views: int, sum_over_ranks: SumOverRanks
) -> Tensor:
    """Normalise a rank's [V * B, C, H, W] by what all ranks have; updates the running statistics.

    `sum_over_ranks` adds a tensor up over ranks, in place. Nothing waits for the device.
    """
    x_VBCHW = _apart(input.detach(), views)
    mean_VC, var_VC, count = _statistics(x_VBCHW, sum_over_ranks)
    update_running(norm, mean_VC, var_VC, count)
    whole = _Whole(mean_VC, torch.rsqrt(var_VC + norm.eps), count, sum_over_ranks)
    return _Normalise.apply(input, norm.weight, norm.bias, whole)  # pyright: ignore[reportReturnType]


@dataclass(frozen=True, slots=True)
class _Whole:
    """What ranks have in common: statistics of views, [V, C]; values a channel and view, [1]; and the sum."""

    mean_VC: Tensor
    invstd_VC: Tensor
    count: Tensor
    sum_over_ranks: SumOverRanks


@torch.no_grad()
def _statistics(x_VBCHW: Tensor, sum_over_ranks: SumOverRanks) -> tuple[Tensor, Tensor, Tensor]:
    """Over all ranks: mean and biased variance of each view and channel, [V, C]; of how many values, [1]."""
    views, batch, channels, height, width = x_VBCHW.shape
    kind = torch.promote_types(x_VBCHW.dtype, torch.float32)
    sums = x_VBCHW.sum(IN_VIEW, dtype=kind).flatten()
    both = torch.cat([sums, sums.new_full((1,), batch * height * width)])
    sum_over_ranks(both)
    count = both[-1:]
    mean_VC = (both[:-1] / count).view(views, channels)
    squares_VC = (x_VBCHW - _spread(mean_VC)).square().sum(IN_VIEW)
    sum_over_ranks(squares_VC)
    return mean_VC, squares_VC / count, count


class _Normalise(torch.autograd.Function):
    """(x - mean) / deviation * weight + bias, where mean and deviation depend on the x of all ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, whole: _Whole) -> Tensor:
        ctx.save_for_backward(x, weight, whole.mean_VC, whole.invstd_VC, whole.count)
        ctx.sum_over_ranks = whole.sum_over_ranks
        scale_VC = whole.invstd_VC if weight is None else whole.invstd_VC * weight
        out_VBCHW = (_apart(x, len(scale_VC)) - _spread(whole.mean_VC)).mul_(_spread(scale_VC))
        if bias is not None:
            out_VBCHW += bias[:, None, None]
        out = torch.empty_like(x)  # not a view, so that a ReLU can be in place
        _apart(out, len(scale_VC)).copy_(out_VBCHW)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        x, weight, mean_VC, invstd_VC, count = ctx.saved_tensors
        grad_VBCHW = _apart(grad, len(mean_VC))
        normal_VBCHW = (_apart(x, len(mean_VC)) - _spread(mean_VC)).mul_(_spread(invstd_VC))
        sums_2VC = torch.stack(
            [
                (grad_VBCHW * normal_VBCHW).sum(IN_VIEW),
                grad_VBCHW.sum(IN_VIEW, dtype=normal_VBCHW.dtype),
            ]
        )
        of_weight = of_bias = None
        if weight is not None:
            of_weight, of_bias = sums_2VC.sum(1).to(weight.dtype)  # of this rank alone
        ctx.sum_over_ranks(sums_2VC)
        along_VC, mean_grad_VC = sums_2VC / count
        scale_VC = invstd_VC if weight is None else invstd_VC * weight
        common_VBCHW = normal_VBCHW.mul_(_spread(along_VC)).add_(_spread(mean_grad_VC))
        of_x = (grad_VBCHW - common_VBCHW).mul_(_spread(scale_VC))
        return of_x.to(x.dtype).flatten(0, 1), of_weight, of_bias, None


def _apart(x: Tensor, views: int) -> Tensor:
    """[V * B, C, H, W] as [V, B, C, H, W]."""
    return x.unflatten(0, (views, len(x) // views))


def _spread(stat_VC: Tensor) -> Tensor:
    return stat_VC[:, None, :, None, None]
