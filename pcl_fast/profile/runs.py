"""What a variant does at each step: the host's part and the device's, as the trainer does them."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch

from pcl_fast.build import build_state
from pcl_fast.config import Config
from pcl_fast.contract import TrainLoader, ViewBatch
from pcl_fast.errors import DivergedError
from pcl_fast.first_batch import check_views
from pcl_fast.metrics import RunningMeans
from pcl_fast.objectives import make_objective
from pcl_fast.profile.baseline import BaselineStep
from pcl_fast.records import num_measured
from pcl_fast.step.capture import CapturedCalls, make_calls
from pcl_fast.step.device_step import DeviceStep
from pcl_fast.step.feed import DeviceFeed, Feed, make_feed
from pcl_fast.step.timetable import Timetable


@dataclass(frozen=True, slots=True)
class Part:
    """The device's part of a step; `restart` goes back to the first one, `fault` says what has broken."""

    step: Callable[[], None]
    restart: Callable[[], None] = lambda: None
    fault: Callable[[], str | None] = lambda: None


class Run:
    """A step for each batch of a feed, through the epochs of a run again and again.

    `said` is what was told meanwhile, as that a graph was captured.
    """

    def __init__(self, config: Config, feed: Feed, part: Part, said: list[str]) -> None:
        self.said, self._feed, self._part = said, feed, part
        self._calls = make_calls(config.capture, torch.device(config.device), said.append, config.compile)
        self._epochs, self._epoch = config.train.epochs, -1

    def __call__(self) -> None:
        """Make a step; raises what the loader raises."""
        shape = None if self._epoch < 0 else self._feed.advance()
        if shape is None:
            self._begin((self._epoch + 1) % self._epochs)
            shape = self._feed.advance()
        assert shape is not None, "an epoch has a batch"
        self._calls.run([self._part.step], shape)

    def _begin(self, epoch: int) -> None:
        if epoch == 0:
            self._part.restart()
        self._feed.begin(epoch, 0)
        self._epoch = epoch

    def find_fault(self) -> str | None:
        """Why the steps were not those that were meant, in a line; waits for the device."""
        if isinstance(self._calls, CapturedCalls) and self._calls.refused is not None:
            return self._calls.refused
        return self._part.fault()

    def close(self) -> None:
        """End what the loader holds for the open epoch, and free the graphs."""
        self._feed.close()
        self._calls.close()


def training_run(config: Config, loader: TrainLoader) -> Run:
    """Our training steps of a resolved configuration, as the trainer makes them."""
    device, uncompiled = torch.device(config.device), list[str]()
    state = build_state(config, say=uncompiled.append)
    objective = state.objective
    width = num_measured(objective)
    timetable = Timetable(config, loader.steps_per_epoch, device)
    means = tuple(RunningMeans(width, device) for _ in range(2))
    feed = _feed(config, loader)
    step = DeviceStep(state, feed, timetable, means)

    def fault() -> str | None:
        try:
            state.guard.check()
        except DivergedError as error:
            return str(error)
        return uncompiled[0].partition("; it runs eager")[0] if uncompiled else None

    return Run(config, feed, Part(step, lambda: step.go_on_after(0), fault), [])


def baseline_run(config: Config, loader: TrainLoader) -> Run:
    """Training steps of the straightforward implementation, which `config` is that of."""
    step = BaselineStep(config)
    timetable = Timetable(config, loader.steps_per_epoch, torch.device(config.device))
    feed = make_feed(loader, lambda _: None, fixed=False)
    steps_done = 0

    def train() -> None:
        nonlocal steps_done
        steps_done += 1
        step(feed.take(), timetable.on_host(steps_done))

    def restart() -> None:
        nonlocal steps_done
        steps_done = 0

    return Run(config, feed, Part(train, restart), [])


def loading_run(config: Config, loader: TrainLoader) -> Run:
    """The batches of a loader, made and dropped."""
    feed = _feed(config, loader)
    if not isinstance(feed, DeviceFeed):  # then the device does nothing that a graph could hold
        config = dataclasses.replace(config, capture="off")

    def take() -> None:
        feed.take()

    return Run(config, feed, Part(take), [])


def _feed(config: Config, loader: TrainLoader) -> Feed:
    device, num_views = torch.device(config.device), make_objective(config).num_views

    def check(batch: ViewBatch) -> None:
        check_views(batch, num_views, config.data.classes, device)

    return make_feed(loader, check, fixed=config.capture == "on")
