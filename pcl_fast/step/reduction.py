"""What a step adds up over all ranks: gradients, running statistics, and what was not finite where.

Each rank differentiates the sum over its images, not their mean; gradients are added up and divided by the
images of all. So ranks may have different numbers of images, and every rank ends a step with the same state.
BatchNorm's statistics are each rank's own in the forward pass; the running ones become the mean over the
images of all ranks, which is what evaluation and a checkpoint see.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from pcl_fast.dist import World


class Reduction:
    """Adds up over the ranks of `world`: `gradients` [P], and the running statistics of `networks`.

    `num_watched` numbers a step are looked at on each rank. With `dtype` bfloat16 gradients travel in it.
    """

    def __init__(
        self,
        world: World,
        gradients: Tensor,
        networks: Sequence[nn.Module],
        num_watched: int,
        dtype: torch.dtype,
    ) -> None:
        self._world, self._gradients = world, gradients
        self._travelling = gradients if dtype == gradients.dtype else torch.empty_like(gradients, dtype=dtype)
        self._statistics = [buffer for network in networks for buffer in _statistics_of(network)]
        width = sum(buffer.numel() for buffer in self._statistics)
        rest = gradients.new_zeros(width + 1 + world.size * num_watched)
        self._rest = rest
        self._means, self._images, self._findings = rest[:width], rest[width], rest[width + 1 :]
        self._places = [
            part.view_as(buffer)
            for part, buffer in zip(
                self._means.split([buffer.numel() for buffer in self._statistics]),
                self._statistics,
                strict=True,
            )
        ]
        self._own_findings = self._findings.view(world.size, num_watched)[world.rank]

    @torch.no_grad()
    def __call__(self, images: int, watched: Sequence[Tensor]) -> Tensor:
        """Make gradients and running statistics those of all ranks, given this one's `images`.

        Returns [ranks * watched]: 0, or NaN where a rank's number was not finite. Device operations only.
        """
        self._findings.zero_()
        self._own_findings.copy_(torch.cat([value.flatten() for value in watched]) * 0)
        self._copy(self._places, self._statistics)
        self._means.mul_(images)
        self._images.fill_(images)
        if self._travelling is not self._gradients:
            self._travelling.copy_(self._gradients)
        self._world.sum_(self._travelling)
        self._world.sum_(self._rest)
        if self._travelling is not self._gradients:
            self._gradients.copy_(self._travelling)
        self._gradients.div_(self._images)
        self._means.div_(self._images)
        self._copy(self._statistics, self._places)
        return self._findings

    def _copy(self, places: list[Tensor], values: list[Tensor]) -> None:
        if places:
            torch._foreach_copy_(places, values)  # pyright: ignore[reportPrivateUsage]


def times(seeds: Sequence[Tensor | None], roots: Sequence[Tensor], factor: float | Tensor) -> list[Tensor]:
    """Seeds of a backward pass that differentiates `factor` times the loss; it may be a scalar there."""
    return [
        torch.ones_like(root) * factor if seed is None else seed * factor
        for seed, root in zip(seeds, roots, strict=True)
    ]


def _statistics_of(network: nn.Module) -> Iterable[Tensor]:
    return (buffer for buffer in network.buffers() if buffer.is_floating_point())
