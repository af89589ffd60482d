"""A whole step with nothing left for the host to say, so that a CUDA graph can hold it."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from pcl_fast.kernels.bookkeeping import add_up
from pcl_fast.metrics import RunningMeans
from pcl_fast.step.feed import Feed
from pcl_fast.step.state import TrainState
from pcl_fast.step.timetable import Timetable
from pcl_fast.step.train_step import train_step


@dataclass(slots=True)
class DeviceStep:
    """Call it to train on the batch that `feed` has ready, by the schedules of the next step.

    Everything that changes from step to step lies on the device: `steps_done`, the place in the epoch, the
    schedules, the sums behind `means`.
    """

    state: TrainState
    feed: Feed
    timetable: Timetable
    means: tuple[RunningMeans, ...]
    steps_done: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.steps_done = torch.zeros((), dtype=torch.int64, device=self.state.arena.buffers.values.device)

    def __call__(self) -> None:
        """Advance everything by one step; device operations only."""
        self.steps_done += 1
        batch = self.feed.take()
        metrics = train_step(self.state, batch, self.timetable.on_device(self.steps_done))
        means = metrics.terms, metrics.gradient_norm
        add_up([running.sums for running in self.means], means, metrics.correct, len(batch.labels_B))

    def go_on_after(self, steps: int) -> None:
        """The next step is number `steps` + 1."""
        self.steps_done.fill_(steps)
