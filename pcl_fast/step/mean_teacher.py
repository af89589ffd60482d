"""The peer mean teachers: the exponential moving average of a network (PCL eq. 4)."""

import copy
from typing import Literal

import torch
from torch import Tensor

from pcl_fast.models.peers import PeerNetwork


class MeanTeacher:
    """A copy of a network that follows it: theta_ema = phi theta_ema + (1 - phi) theta.

    Every parameter is averaged: trunk, branches, classifiers, ensemble classifier (`Arena.update`, with the
    optimizer's step). `ema_bn` says what becomes of BatchNorm's running statistics: `own`, the copy runs in
    train mode and keeps statistics of its own batches; `copy` and `ema`, it takes the network's, as they are
    or averaged alike, and runs in eval mode.
    """

    def __init__(self, network: PeerNetwork, ema_bn: Literal["own", "copy", "ema"]) -> None:
        self.network = copy.deepcopy(network).requires_grad_(False)
        self.ema_bn = ema_bn
        self.learning_mode()

    def learning_mode(self) -> None:
        """The mode in which it teaches, after an evaluation has changed it."""
        self.network.train(self.ema_bn == "own")

    @torch.no_grad()
    def follow_statistics(self, student: PeerNetwork, phi: Tensor) -> None:
        """Take over the student's running statistics as `ema_bn` says; `phi` is a scalar on the device."""
        if self.ema_bn == "own":
            return
        pairs = list(zip(self.network.buffers(), student.buffers(), strict=True))
        averaged = [pair for pair in pairs if pair[0].is_floating_point() and self.ema_bn == "ema"]
        copied = [pair for pair in pairs if not (pair[0].is_floating_point() and self.ema_bn == "ema")]
        if averaged:
            _average([mine for mine, _ in averaged], [theirs for _, theirs in averaged], phi)
        for mine, theirs in copied:
            mine.copy_(theirs)


def _average(averages: list[Tensor], values: list[Tensor], phi: Tensor) -> None:
    """In float32 (or wider), literally: with phi = 0 a bitwise copy, with phi = 1 no change."""
    phi = phi.to(averages[0].dtype)
    shares = torch._foreach_mul(values, 1 - phi)  # pyright: ignore[reportPrivateUsage]
    torch._foreach_mul_(averages, phi)  # pyright: ignore[reportPrivateUsage]
    torch._foreach_add_(averages, shares)  # pyright: ignore[reportPrivateUsage]
