"""However a run is stopped, going on ends in the same bits as never having stopped."""

import dataclasses
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pcl_fast.errors import Preempted
from pcl_fast.sinks import read_records
from tests.conftest import REPOSITORY
from tests.tiny import (
    STEPS,
    STEPS_PER_EPOCH,
    SignalAtStep,
    SignalInEvaluation,
    Watcher,
    assert_same_run,
    newest_checkpoint,
    tiny_config,
    tiny_data,
    train,
)

TRAIN_SLOWLY = """
import sys, time
from pathlib import Path
from tests.tiny import Watcher, train

class Announce(Watcher):
    def stepped(self, step):
        print(step, flush=True)
        time.sleep(0.05)

train(Path(sys.argv[1]), sinks=[Announce()])
"""


@pytest.mark.parametrize(
    ("step", "number"),
    [
        pytest.param(1, signal.SIGTERM, id="first step"),
        pytest.param(2, signal.SIGUSR1, id="mid-epoch"),
        pytest.param(STEPS_PER_EPOCH, signal.SIGINT, id="last step of an epoch"),
        pytest.param(STEPS_PER_EPOCH + 1, signal.SIGTERM, id="first step of the next epoch"),
        pytest.param(STEPS, signal.SIGTERM, id="last step of all"),
    ],
)
def test_a_signal_and_resuming_change_nothing(
    straight: Path, tmp_path: Path, step: int, number: signal.Signals
) -> None:
    run, stopper = tmp_path / "run", SignalAtStep(step, number)
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    with pytest.raises(Preempted, match=f"stopped by {number.name} after step {step};") as stop:
        train(run, sinks=[stopper])
    assert stop.value.exit_code == 75
    assert stopper.steps == list(range(1, step + 1)), "it stopped within a step"
    assert stopper.closings == 1
    assert newest_checkpoint(run)["progress"]["steps_done"] == step
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == handlers
    watcher = Watcher()
    train(run, sinks=[watcher])
    assert watcher.info is not None
    assert watcher.info.first_step == step
    assert watcher.steps == list(range(step + 1, STEPS + 1)), "no step is done twice"
    assert_same_run(run, straight)


def test_stopping_after_every_single_step_changes_nothing(straight: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for step in range(1, STEPS + 1):
        with pytest.raises(Preempted, match=f"after step {step};"):
            train(run, sinks=[SignalAtStep(None)])
    train(run)
    assert_same_run(run, straight)


@pytest.mark.parametrize("pass_", [1, 2], ids=["first", "last"])
def test_a_signal_during_an_evaluation_is_served_within_a_batch(
    straight: Path, tmp_path: Path, pass_: int
) -> None:
    run, data = tmp_path / "run", tiny_data(tiny_config())
    val = SignalInEvaluation(data.val, pass_)
    step = STEPS_PER_EPOCH * pass_
    with pytest.raises(Preempted, match=f"SIGTERM after step {step};"):
        train(run, data=dataclasses.replace(data, val=val))
    assert (val.passes, val.batches) == (pass_, 3 * (pass_ - 1) + 2)
    assert newest_checkpoint(run)["progress"]["epochs_closed"] == pass_ - 1
    train(run)
    assert_same_run(run, straight)


class SignalAtTheEnd(Watcher):
    """The signal comes after the last evaluation, while the last checkpoint is about to be saved."""

    def recorded(self, record: dict[str, Any]) -> None:
        if record["kind"] == "epoch" and record["step"] == STEPS:
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_during_the_last_save_is_not_lost(straight: Path, tmp_path: Path) -> None:
    """Otherwise a comparison would begin its next run."""
    with pytest.raises(Preempted, match=f"after step {STEPS};"):
        train(tmp_path / "run", sinks=[SignalAtTheEnd()])
    assert_same_run(tmp_path / "run", straight)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"method": "vanilla"}, id="vanilla"),
        pytest.param({"pcl": {"ema_bn": "copy"}}, id="mean teachers in eval mode"),
        pytest.param({"pcl": {"ema_bn": "ema", "view_per_peer": False}}, id="averaged statistics, one view"),
        pytest.param({"amp": {"dtype": "bfloat16"}, "channels_last": "on"}, id="bfloat16"),
    ],
)
def test_resuming_is_exact_in_other_modes_too(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = tiny_config(**changes)
    train(tmp_path / "straight", config)
    with pytest.raises(Preempted):
        train(tmp_path / "run", config, [SignalAtStep(3)])
    train(tmp_path / "run", config)
    assert_same_run(tmp_path / "run", tmp_path / "straight")


def test_two_runs_are_the_same_and_another_seed_is_another_run(straight: Path, tmp_path: Path) -> None:
    train(tmp_path / "again")
    assert_same_run(tmp_path / "again", straight)
    train(tmp_path / "other", tiny_config(seed=1))
    with pytest.raises(AssertionError):
        assert_same_run(tmp_path / "other", straight)


def kill_after_step(run: Path, step: int) -> list[int]:
    """Train in a process of its own, SIGKILL it some time after a step, and return the steps it announced."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    child = subprocess.Popen(
        [sys.executable, "-c", TRAIN_SLOWLY, str(run)], env=environment, stdout=subprocess.PIPE, text=True
    )
    announced: list[int] = []
    try:
        assert child.stdout is not None
        for line in child.stdout:
            announced.append(int(line))
            if announced[-1] == step:
                break
        child.kill()
        assert child.wait(timeout=30) == -signal.SIGKILL, "it was still at work"
    finally:
        child.kill()
        child.wait()
        if child.stdout:
            child.stdout.close()
    return announced


@pytest.mark.timeout(120)
@pytest.mark.parametrize("steps", [range(1, 4), range(5, 8)], ids=["before a checkpoint", "after one"])
def test_kill_9_at_a_random_step_and_resuming_change_nothing(
    straight: Path, tmp_path: Path, steps: range
) -> None:
    run, step = tmp_path / "run", random.SystemRandom().choice(steps)
    assert kill_after_step(run, step)[-1] == step
    whole = read_records(run / "metrics.jsonl")
    assert len(whole) >= step // 3, "records are visible at once"
    with (run / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"kind": "step", "epoch": 1, "st')  # a line torn by the kill
    assert read_records(run / "metrics.jsonl") == whole

    watcher = Watcher()
    train(run, sinks=[watcher])
    assert watcher.info is not None
    assert watcher.info.first_step == (0 if step < STEPS_PER_EPOCH else STEPS_PER_EPOCH)
    assert_same_run(run, straight)
