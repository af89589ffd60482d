"""In float64 several ranks do what one process does with the whole batch, up to rounding.

Where the mathematics says so: BatchNorm sees all ranks' batches, or none. Five images are left for the last
step of an epoch, which ranks cannot share evenly.
"""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pcl_fast.build import build_state
from pcl_fast.dist import ALONE, World, joined
from pcl_fast.metrics import RunningMeans
from pcl_fast.records import num_measured
from pcl_fast.step.device_step import DeviceStep
from pcl_fast.step.feed import make_feed
from pcl_fast.step.state import TrainState
from pcl_fast.step.timetable import Timetable
from tests.dist.parts import CPU, Precise, config_of, data_of, digest, tensors_of
from tests.dist.ranks import run_ranks

IMAGES, EPOCHS = 21, 4  # of three steps: 8, 8 and 5 images
CASES: dict[str, dict[str, Any]] = {
    "sync-own": {"pcl": {"num_peers": 3}},
    "sync-ema": {"pcl": {"num_peers": 3, "ema_bn": "ema"}},
    "sync-vanilla": {"method": "vanilla"},
    "sync-smoothed": {"pcl": {"num_peers": 2}, "train": {"label_smoothing": 0.1}},
    "frozen-own": {"pcl": {"num_peers": 2}},
    "frozen-vanilla": {"method": "vanilla"},
    "local": {"pcl": {"num_peers": 2}},
}
ON_RANKS = {1: ["local"], 2: [*CASES][:-1], 4: ["sync-own", "frozen-vanilla"]}
CLOSE = 1e-11  # 7e-13 was seen: rounding grows from step to step


@dataclass(frozen=True)
class Course:
    """What a run measured at each step, its state after each as a digest, and after the last."""

    measured_GM: list[list[float]]
    digests_G: list[int]
    state: dict[str, Tensor]


Courses = dict[str, Course]


def freeze(state: TrainState) -> None:
    """Make every BatchNorm a fixed map, and no trivial one."""
    assert state.mean_teacher is not None or not state.objective.uses_mean_teacher
    teacher = state.mean_teacher.network if state.mean_teacher else None
    for network in (state.network, teacher):
        draws = torch.Generator().manual_seed(3)
        for norm in network.modules() if network else ():
            if isinstance(norm, nn.BatchNorm2d):
                assert norm.running_mean is not None
                assert norm.running_var is not None
                norm.eval()
                norm.running_mean.normal_(generator=draws)
                norm.running_var.uniform_(4.0, 8.0, generator=draws)


def course(name: str, world: World, count: int = IMAGES, **changes: Any) -> Course:
    """Train as the trainer does, with what it does it with."""
    sync = {"sync_bn": name.startswith("sync")}
    case: dict[str, Any] = CASES[name] | sync | changes
    train: dict[str, Any] = {"epochs": EPOCHS} | case.pop("train", {})
    config = config_of(world.size, train=train, **case)
    state = build_state(config, torch.float64, world=world)
    if name.startswith("frozen"):
        freeze(state)
    loader = Precise(data_of(config, world.rank, count, drop_last=False).train)
    means = RunningMeans(num_measured(state.objective), CPU, world)
    feed = make_feed(loader, lambda batch: None, fixed=False)
    step = DeviceStep(state, feed, Timetable(config, loader.steps_per_epoch, CPU), (means,))
    measured_GM: list[list[float]] = []
    digests_G: list[int] = []
    for epoch in range(EPOCHS):
        feed.begin(epoch, 0)
        while (shape := feed.advance()) is not None:
            step()
            state.guard.check()
            means.count(shape.images)
            measured_GM.append(means.means())
            means.reset()
            digests_G.append(digest(state))
    return Course(measured_GM, digests_G, tensors_of(state))


def courses(names: list[str]) -> dict[str, Course]:
    """On a rank."""
    with joined(CPU, 60) as world:
        return {name: course(name, world) for name in names}


@pytest.fixture(scope="module")
def alone() -> dict[str, Course]:
    return {name: course(name, ALONE) for name in CASES}


@pytest.fixture(scope="module", params=ON_RANKS, ids="{} ranks".format)
def by_rank(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Courses]:
    """The courses of every rank, by the case."""
    size = request.param
    return run_ranks(tmp_path_factory.mktemp("ranks"), size, courses, [ON_RANKS[size]])


def assert_close(found: Tensor, expected: Tensor, what: str) -> None:
    """To within `CLOSE` of the largest of the expected numbers."""
    if not expected.is_floating_point():
        assert torch.equal(found, expected), what
        return
    error = (found - expected).abs().max() / expected.abs().max().clamp(min=1e-300)
    assert error < CLOSE, f"{what}: off by {error:.1e}"


def test_ranks_do_what_one_process_does(alone: Courses, by_rank: list[Courses]) -> None:
    for name, found in by_rank[0].items():
        expected = alone[name]
        assert len(expected.measured_GM) == 12
        assert expected.state.keys() == found.state.keys()
        for entry, tensor in expected.state.items():
            assert_close(found.state[entry], tensor, f"{name}: {entry}")
        rows = torch.tensor([found.measured_GM, expected.measured_GM], dtype=torch.float64)
        for number, (one, other) in enumerate(zip(*rows.mT, strict=True)):
            assert_close(one, other, f"{name}: measured {number}")


def test_all_ranks_have_the_same_bits_after_every_step(by_rank: list[Courses]) -> None:
    for name, first in by_rank[0].items():
        assert len(set(first.digests_G)) == 12, "every step changes something"
        for rank in by_rank[1:]:
            assert rank[name].digests_G == first.digests_G
            assert rank[name].measured_GM == first.measured_GM
