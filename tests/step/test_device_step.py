"""A step that finds its batch, its schedules and its sums on the device, against steps that are told."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from pcl_fast.build import build_state
from pcl_fast.config import Config
from pcl_fast.contract import TrainLoader, ViewBatch
from pcl_fast.metrics import RunningMeans
from pcl_fast.step.device_step import DeviceStep
from pcl_fast.step.feed import Feed, make_feed
from pcl_fast.step.obstacles import find_obstacle
from pcl_fast.step.state import TrainState
from pcl_fast.step.timetable import Timetable
from pcl_fast.step.train_step import StepMetrics, train_step
from pipelines.augment import NORMALISATIONS
from pipelines.resident import ResidentTrainLoader, TrainOptions
from tests.step.tiny import BATCH, CLASSES, SIZE, tiny_config

CPU = torch.device("cpu")
IMAGES, EPOCHS = 2 * BATCH + 2, 3
METHODS: list[dict[str, Any]] = [
    {},
    {"ema_bn": "copy"},
    {"ema_bn": "ema", "num_peers": 2},
    {"num_peers": 1},
    {"detach_ensemble": False, "num_peers": 2},
    {"method": "vanilla"},
]


@dataclass
class Run:
    """A run of which one step is made at a time."""

    config: Config
    state: TrainState
    loader: TrainLoader
    timetable: Timetable
    feed: Feed
    means: tuple[RunningMeans, RunningMeans]
    step: DeviceStep


def make_run(drop_last: bool = True, method: str = "pcl", **pcl: Any) -> Run:
    """Some steps an epoch, and schedules that change from epoch to epoch."""
    config = dataclasses.replace(tiny_config(**pcl), method=method)  # pyright: ignore[reportArgumentType]
    state = build_state(config)
    draws = torch.Generator().manual_seed(6)
    options = TrainOptions(
        batch_size=BATCH,
        num_classes=CLASSES,
        normalisation=NORMALISATIONS["cifar10"],
        device=CPU,
        channels_last=False,
        num_views=state.objective.num_views,
        seed=3,
        drop_last=drop_last,
    )
    images = torch.randint(0, 256, (IMAGES, 3, SIZE, SIZE), dtype=torch.uint8, generator=draws)
    loader = ResidentTrainLoader(images, torch.randint(CLASSES, (IMAGES,), generator=draws), options)
    timetable = Timetable(config, loader.steps_per_epoch, CPU)
    width = len(state.guard.names) + state.objective.num_peers + state.objective.has_ensemble
    means = RunningMeans(width, CPU), RunningMeans(width, CPU)
    feed = make_feed(loader, lambda batch: None, fixed=False)
    step = DeviceStep(state, feed, timetable, means)
    return Run(config, state, loader, timetable, feed, means, step)


def make_steps(run: Run, first_epoch: int = 0, first_step: int = 0) -> Iterator[int]:
    """The sizes of the batches that were trained on, one a step."""
    for epoch in range(first_epoch, EPOCHS):
        run.feed.begin(epoch, first_step if epoch == first_epoch else 0)
        while (shape := run.feed.advance()) is not None:
            run.step()
            yield shape.images


def told_steps(run: Run) -> Iterator[tuple[StepMetrics, ViewBatch]]:
    """The same steps with the schedules' numbers, from the host."""
    step = 0
    for epoch in range(EPOCHS):
        for batch in run.loader.epoch(epoch):
            step += 1
            yield train_step(run.state, batch, run.timetable.on_host(step)), batch


def assert_equal_states(one: TrainState, other: TrainState) -> None:
    mine, theirs = one.state_dict(), other.state_dict()
    for part in ("network", "mean_teacher", "momentum"):
        assert (mine[part] is None) == (theirs[part] is None)
        for name, tensor in (mine[part] or {}).items():
            assert torch.equal(tensor, theirs[part][name]), f"{part} {name}"


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_steps_by_themselves_are_steps_that_are_told(method: dict[str, Any]) -> None:
    ours, theirs = make_run(**method), make_run(**method)
    sizes: list[int] = []
    for size in make_steps(ours):
        sizes.append(size)
        assert int(ours.step.steps_done) == len(sizes)
    assert sizes == [BATCH for _ in told_steps(theirs)]
    assert len(sizes) == EPOCHS * (IMAGES // BATCH)
    assert_equal_states(ours.state, theirs.state)


def test_going_on_after_some_steps_is_never_having_stopped() -> None:
    straight, stopped, resumed = make_run(), make_run(), make_run()
    total = sum(1 for _ in make_steps(straight))
    steps = make_steps(stopped)
    for _ in range(3):  # of two in an epoch
        next(steps)
    resumed.state.load_state_dict(stopped.state.state_dict())
    resumed.step.go_on_after(3)
    assert sum(1 for _ in make_steps(resumed, first_epoch=1, first_step=1)) == total - 3
    assert int(resumed.step.steps_done) == int(straight.step.steps_done) == total
    assert_equal_states(resumed.state, straight.state)


def test_going_on_keeps_the_counter_where_a_graph_reads_it() -> None:
    run = make_run()
    before = run.step.steps_done.data_ptr()
    run.step.go_on_after(7)
    assert (run.step.steps_done.data_ptr(), int(run.step.steps_done)) == (before, 7)


@pytest.mark.parametrize("drop_last", [True, False])
def test_means_are_over_images_not_over_steps(drop_last: bool) -> None:
    """A last batch of two images counts half of one of four."""
    ours, theirs = make_run(drop_last), make_run(drop_last)
    sizes = list(make_steps(ours))
    assert set(sizes) == ({BATCH} if drop_last else {BATCH, IMAGES % BATCH})
    for size in sizes:
        for means in ours.means:
            means.count(size)
    sums: Tensor | float = 0.0
    for metrics, batch in told_steps(theirs):
        values = torch.cat([metrics.terms, metrics.gradient_norm[None]]).double() * len(batch.labels_B)
        sums = torch.cat([values, metrics.correct.double()]) + sums
    assert isinstance(sums, Tensor)
    expected = (sums / sum(sizes)).tolist()
    for means in ours.means:
        assert means.means() == pytest.approx(expected, rel=1e-6)
    right = expected[len(theirs.state.guard.names) :]
    assert 0 < max(right) <= 1
    assert_equal_states(ours.state, theirs.state)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_the_device_is_asked_for_no_value(method: dict[str, Any]) -> None:
    run = make_run(**method)
    run.feed.begin(0, 0)
    assert find_obstacle(run.step) is None
