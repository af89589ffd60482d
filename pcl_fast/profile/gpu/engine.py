"""Steps of one or several runs together, as the trainer makes them, with their states open to change."""

from collections.abc import Callable, Sequence

import torch

from pcl_fast.build import build_state
from pcl_fast.config import Config
from pcl_fast.device import prepare_backend
from pcl_fast.metrics import RunningMeans
from pcl_fast.profile.noise import NoiseLoader
from pcl_fast.profile.variants import synchronize
from pcl_fast.step.capture import WARMUP, make_calls
from pcl_fast.step.device_step import DeviceStep
from pcl_fast.step.feed import make_feed
from pcl_fast.step.state import TrainState
from pcl_fast.step.timetable import Timetable


class Engine:
    """Calls a step of every run, side by side, on one batch of noise each; captured on a GPU.

    `configs` are what a variant makes of resolved ones. `change` may alter each state before its first step.
    """

    def __init__(
        self, configs: Sequence[Config], change: Callable[[TrainState], None] = lambda state: None
    ) -> None:
        first, self._said = configs[0], list[str]()
        prepare_backend(first)
        self.device = torch.device(first.device)
        self.states: list[TrainState] = []
        self._steps: list[DeviceStep] = []
        for config in configs:
            state = build_state(config)
            change(state)
            self.states.append(state)
            self._steps.append(_device_step(config, state, self.device))
        self._calls = make_calls(first.capture, self.device, self._said.append, first.compile)
        for _ in range(WARMUP + 2):
            self.step()
        synchronize(self.device)

    def step(self) -> None:
        """Make a step of every run."""
        self._calls.run(self._steps, len(self._steps))

    def check(self) -> None:
        """Raise if a step was not finite, or not captured where it should have been."""
        for state in self.states:
            state.guard.check()
        refused = getattr(self._calls, "refused", None)
        if refused is not None:
            raise RuntimeError(refused)

    def close(self) -> None:
        """Free the graphs."""
        self._calls.close()


def _device_step(config: Config, state: TrainState, device: torch.device) -> DeviceStep:
    loader = NoiseLoader(config)
    feed = make_feed(loader, lambda batch: None, fixed=True)
    feed.begin(0, 0)
    objective = state.objective
    width = len(objective.term_names) + objective.num_peers + objective.has_ensemble + 1
    means = tuple(RunningMeans(width, device) for _ in range(2))
    return DeviceStep(state, feed, Timetable(config, loader.steps_per_epoch, device), means)
