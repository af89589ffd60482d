"""The schedules of a run as tables, on the host and on the device, so that a step can look itself up."""

import math

import torch
from torch import Tensor

from pcl_fast.config import Config
from pcl_fast.kernels.bookkeeping import look_up
from pcl_fast.schedules import (
    ema_coefficient,
    learning_rate,
    mixup_shares,
    rampup_weight,
    warmup_factor,
)
from pcl_fast.step.train_step import Moment


class Timetable:
    """Learning rate, w(e), phi(g) and mixup's lambda of every step of a run of a resolved configuration.

    The first three are products of what the epoch and what the step say; the learning rate's factor by step
    is the warm-up. The device's tables hold the very float64 numbers that the host's do, so both say the same
    of a step, to the bit.
    """

    def __init__(self, config: Config, steps_per_epoch: int, device: torch.device) -> None:
        self.steps_per_epoch = steps_per_epoch
        self._by_epoch = _by_epoch(config)
        self._by_step = _by_step(config, steps_per_epoch)
        self._epochs = torch.tensor(self._by_epoch, dtype=torch.float64, device=device)
        self._steps = torch.tensor(self._by_step, dtype=torch.float64, device=device)
        mixup, steps = config.train.mixup, config.train.epochs * steps_per_epoch
        self._mixup = mixup_shares(mixup, config.seed, steps) if mixup else None
        self._mixup_S = torch.tensor(self._mixup or (), dtype=torch.float64, device=device)

    def on_host(self, step: int) -> Moment:
        """The schedules at a step, 1 for the first, as numbers."""
        epoch, place = (step - 1) // self.steps_per_epoch, min(step, len(self._by_step[0])) - 1
        rows = zip(self._by_epoch, self._by_step, strict=True)
        lr, weight, phi = (of_epoch[epoch] * of_step[place] for of_epoch, of_step in rows)
        mixup = 1.0 if self._mixup is None else self._mixup[step - 1]
        return Moment(step=step, lr=lr, distill_weight=weight, ema_coefficient=phi, mixup=mixup)

    def on_device(self, step: Tensor) -> Moment:
        """The same at an int64 scalar on the device, as scalars there; nothing waits."""
        lr, weight, phi = look_up(step, self._epochs, self._steps, self.steps_per_epoch).unbind()
        share = 1.0 if self._mixup is None else self._mixup_S.index_select(0, step.view(1) - 1)[0]
        return Moment(step=step, lr=lr, distill_weight=weight, ema_coefficient=phi, mixup=share)


def _by_epoch(config: Config) -> list[list[float]]:
    """Of each epoch: the learning rate, w(e), and 1."""
    optim, pcl, epochs = config.optim, config.pcl, config.train.epochs
    alpha = pcl.rampup_epochs
    assert alpha is not None, "the configuration is resolved"
    start, milestones = config.initial_lr, (optim.milestones, optim.gamma)
    return [
        [learning_rate(start, epoch, epochs, *milestones) for epoch in range(epochs)],
        [rampup_weight(epoch, pcl.distill_weight, alpha) for epoch in range(epochs)],
        [1.0] * epochs,
    ]


def _by_step(config: Config, steps_per_epoch: int) -> list[list[float]]:
    """Of each step up to where all has risen: the warm-up's factor, 1, and phi(g)."""
    decay, warmup = config.pcl.ema_decay, config.optim.warmup_epochs * steps_per_epoch
    # phi has reached its ceiling once 1 - 1/g has.
    risen = max(math.ceil(1 / (1 - decay)) + 1, math.ceil(warmup))
    steps = range(1, min(risen, config.train.epochs * steps_per_epoch) + 1)
    return [
        [warmup_factor(step, warmup) for step in steps],
        [1.0 for _ in steps],
        [ema_coefficient(step, decay) for step in steps],
    ]
