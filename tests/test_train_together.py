"""Runs side by side end as each alone does, whatever happens to the others."""

import contextlib
import dataclasses
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from pcl_fast.config import Config
from pcl_fast.contract import OpenData
from pcl_fast.errors import DivergedError, Preempted
from pcl_fast.run_folder import RunFolder
from pcl_fast.sinks import JsonlSink, Sink, read_records
from pcl_fast.trainer import Trainer, train_together
from tests.tiny import (
    STEPS,
    Damaging,
    SignalAtStep,
    Watcher,
    assert_bitwise_equal,
    newest_checkpoint,
    read_model,
    timeless,
    tiny_config,
    tiny_data,
    train,
)

Data = Callable[[Config], OpenData]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of three seeds, each by itself: `alone / "0"`, `"1"`, `"2"`."""
    root = tmp_path_factory.mktemp("alone")
    for seed in range(3):
        train(root / str(seed), tiny_config(seed=seed))
    return root


def train_all(
    root: Path,
    seeds: Sequence[int],
    sinks: dict[int, Sink] | None = None,
    data: dict[int, Data] | None = None,
) -> None:
    """Train seeds side by side, each in its folder, as the command does."""
    torch.set_num_threads(1)
    with contextlib.ExitStack() as stack:
        trainers: list[Trainer] = []
        for seed in seeds:
            config, folder = tiny_config(seed=seed), RunFolder(root / str(seed))
            stack.callback(folder.claim(config).close)
            own = [sinks[seed]] if sinks and seed in sinks else []
            opened = (data or {}).get(seed, tiny_data)(config)
            trainers.append(Trainer(config, opened, folder, [JsonlSink(folder.metrics), *own]))
        train_together(trainers)


def assert_same(one: Path, other: Path) -> None:
    """Weights, averages, buffers, momentum, progress, records and product; torch's generator is shared."""
    checkpoints = [newest_checkpoint(path) for path in (one, other)]
    for content in checkpoints:
        for rank in content["ranks"]:
            del rank["rng"]
    assert_bitwise_equal(*checkpoints)
    left, right = (timeless(read_records(path / "metrics.jsonl")) for path in (one, other))
    assert left == right
    assert_bitwise_equal(*(read_model(path / "model.safetensors") for path in (one, other)))


def steps_done(path: Path) -> int:
    return newest_checkpoint(path)["progress"]["steps_done"]


class Log(Watcher):
    """Notes its seed in a list shared with others, after each step."""

    def __init__(self, seed: int, shared: list[int]) -> None:
        super().__init__()
        self.seed, self.shared = seed, shared

    def stepped(self, step: int) -> None:
        super().stepped(step)
        self.shared.append(self.seed)


def test_side_by_side_they_are_what_each_is_alone(alone: Path, tmp_path: Path) -> None:
    seeds = [2, 0, 1]
    order: list[int] = []
    watchers: dict[int, Sink] = {seed: Log(seed, order) for seed in seeds}
    train_all(tmp_path, seeds, watchers)
    assert order == seeds * STEPS, "a step of each in turn"
    for seed in seeds:
        assert_same(tmp_path / str(seed), alone / str(seed))


def test_one_that_lags_behind_catches_up(alone: Path, tmp_path: Path) -> None:
    for seed, step in ((0, 3), (2, 5)):
        with pytest.raises(Preempted):
            train(tmp_path / str(seed), tiny_config(seed=seed), [SignalAtStep(step)])
    order: list[int] = []
    train_all(tmp_path, [0, 1, 2], {seed: Log(seed, order) for seed in range(3)})
    assert order == [1] * 3 + [0, 1] * 2 + [0, 1, 2] * (STEPS - 5)
    for seed in range(3):
        assert_same(tmp_path / str(seed), alone / str(seed))


def test_one_that_is_done_is_not_trained_again(alone: Path, tmp_path: Path) -> None:
    train_all(tmp_path, [0])
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "0").rglob("*.pt")}
    order: list[int] = []
    train_all(tmp_path, [0, 1], {seed: Log(seed, order) for seed in range(2)})
    assert order == [1] * STEPS
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "0").rglob("*.pt")} == before
    assert_same(tmp_path / "1", alone / "1")
    train_all(tmp_path, [0, 1])
    assert order == [1] * STEPS


def damaged(step: int) -> Data:
    """Data with a number that is none, in a step of the second epoch."""

    def make(config: Config) -> OpenData:
        data = tiny_data(config)
        return dataclasses.replace(data, train=Damaging(data.train, 1, step, 0))

    return make


def test_one_that_diverges_ends_alone_and_is_told_at_the_end(alone: Path, tmp_path: Path) -> None:
    watchers = {seed: Watcher() for seed in range(3)}
    with pytest.raises(DivergedError, match=r"^step 6: not finite: ") as error:
        train_all(tmp_path, [0, 1, 2], {**watchers}, {1: damaged(2)})
    assert error.value.exit_code == 4
    assert str(tmp_path / "1" / "checkpoints" / "step-00000004.pt") in str(error.value)
    assert watchers[1].steps == list(range(1, 6))
    (message,) = watchers[1].messages
    assert message.startswith("this run ends here, the others go on: step 6: not finite: ")
    for seed in (0, 2):
        assert watchers[seed].messages == []
        assert_same(tmp_path / str(seed), alone / str(seed))
    train_all(tmp_path, [0, 1, 2])  # with sound data it goes on where it was saved
    assert_same(tmp_path / "1", alone / "1")


def test_when_all_diverge_the_first_is_told(tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match=r"^step 6: "):
        train_all(tmp_path, [0, 1], data={0: damaged(3), 1: damaged(2)})
    assert [steps_done(tmp_path / seed) for seed in "01"] == [4, 4]


def test_a_signal_stops_all_with_everything_saved(alone: Path, tmp_path: Path) -> None:
    step, number = 5, signal.SIGTERM
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    watchers = {0: Watcher(), 1: SignalAtStep(step, number), 2: Watcher()}
    with pytest.raises(Preempted, match=f"stopped by {number.name} after step {step};") as stop:
        train_all(tmp_path, [0, 1, 2], {**watchers})
    assert stop.value.exit_code == 75
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == handlers
    # The first had fetched its next batch before the signal came, and trains on it.
    assert [steps_done(tmp_path / seed) for seed in "012"] == [step + 1, step, step]
    assert [watcher.closings for watcher in watchers.values()] == [1] * 3
    assert [watcher.messages for watcher in watchers.values()] == [[]] * 3
    train_all(tmp_path, [0, 1, 2])
    for seed in "012":
        assert_same(tmp_path / seed, alone / seed)


def test_a_signal_while_one_catches_up_stops_those_ahead_too(alone: Path, tmp_path: Path) -> None:
    with pytest.raises(Preempted):
        train(tmp_path / "0", tiny_config(seed=0), [SignalAtStep(5)])
    with pytest.raises(Preempted):
        train_all(tmp_path, [0, 1], {1: SignalAtStep(2, signal.SIGINT)})
    assert steps_done(tmp_path / "1") == 2
    assert steps_done(tmp_path / "0") == 6
    train_all(tmp_path, [0, 1])
    for seed in range(2):
        assert_same(tmp_path / str(seed), alone / str(seed))


def test_a_signal_counts_more_than_a_run_that_has_failed(tmp_path: Path) -> None:
    """All others can go on: that is what the exit code says."""
    with pytest.raises(Preempted):
        train_all(tmp_path, [0, 1], {0: SignalAtStep(7)}, {1: damaged(2)})
    assert steps_done(tmp_path / "0") == 7


class Crash(Watcher):
    """Something unforeseen after a step."""

    def stepped(self, step: int) -> None:
        super().stepped(step)
        if step == 2:
            raise KeyboardInterrupt


def test_what_nobody_foresaw_ends_all_and_leaves_nothing_open(tmp_path: Path) -> None:
    watchers = {0: Watcher(), 1: Crash(), 2: Watcher()}
    with pytest.raises(KeyboardInterrupt) as caught:  # which keeps alive what nobody closes
        train_all(tmp_path, [0, 1, 2], {**watchers})
    assert caught.traceback
    assert [watcher.closings for watcher in watchers.values()] == [1] * 3
    assert [len(watcher.steps) for watcher in watchers.values()] == [2, 2, 1]
    train_all(tmp_path, [1])  # no folder is still held
