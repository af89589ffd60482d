"""The schedules of a run as tables, on the host and on the device, so that a step can look itself up."""

import math

import torch
from torch import Tensor

from pcl_fast.config import Config
from pcl_fast.kernels.bookkeeping import look_up
from pcl_fast.schedules import ema_coefficient, learning_rate, rampup_weight
from pcl_fast.step.train_step import Moment


class Timetable:
    """Learning rate, w(e) and phi(g) of every step of a run of a resolved configuration.

    The device's tables hold the very float64 numbers that the host's do, so both say the same of a step.
    """

    def __init__(self, config: Config, steps_per_epoch: int, device: torch.device) -> None:
        optim, pcl, epochs = config.optim, config.pcl, config.train.epochs
        assert pcl.rampup_epochs is not None, "the configuration is resolved"
        self.steps_per_epoch = steps_per_epoch
        milestones = optim.milestones, optim.gamma
        rows = [
            [learning_rate(optim.lr, epoch, epochs, *milestones) for epoch in range(epochs)],
            [rampup_weight(epoch, pcl.distill_weight, pcl.rampup_epochs) for epoch in range(epochs)],
        ]
        # phi has reached its ceiling once 1 - 1/g has.
        risen = min(math.ceil(1 / (1 - pcl.ema_decay)) + 1, epochs * steps_per_epoch)
        self._by_epoch = rows
        self._by_step = [ema_coefficient(step, pcl.ema_decay) for step in range(1, risen + 1)]
        self._epochs = torch.tensor(rows, dtype=torch.float64, device=device)
        self._steps = torch.tensor(self._by_step, dtype=torch.float64, device=device)

    def on_host(self, step: int) -> Moment:
        """The schedules at a step, 1 for the first, as numbers."""
        lr, weight = (row[(step - 1) // self.steps_per_epoch] for row in self._by_epoch)
        phi = self._by_step[min(step, len(self._by_step)) - 1]
        return Moment(step=step, lr=lr, distill_weight=weight, ema_coefficient=phi)

    def on_device(self, step: Tensor) -> Moment:
        """The same at an int64 scalar on the device, as scalars there; nothing waits."""
        lr, weight, phi = look_up(step, self._epochs, self._steps, self.steps_per_epoch).unbind()
        return Moment(step=step, lr=lr, distill_weight=weight, ema_coefficient=phi)
