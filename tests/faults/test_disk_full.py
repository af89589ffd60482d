"""A disk that is full: training goes on, what was saved stays, and the user is told."""

import contextlib
import threading
from pathlib import Path
from typing import Any

import pytest

from pcl_fast.errors import PclError
from pcl_fast.sinks import read_records
from tests.tiny import (
    SignalAtStep,
    Watcher,
    assert_same_run,
    files_limited_to,
    newest_checkpoint,
    timeless,
    tiny_config,
    train,
)

NO_CHECKPOINT = 200_000  # bytes; a checkpoint has more than a million, metrics.jsonl a few thousand


class DiskFull(Watcher):
    """The disk is full after step `first`, until after step `last`; no save is under way at a step's end."""

    def __init__(self, first: int, last: int, size: int = NO_CHECKPOINT) -> None:
        super().__init__()
        self.first, self.last, self.size = first, last, size
        self.full = contextlib.ExitStack()

    def stepped(self, step: int) -> None:
        super().stepped(step)
        for thread in threading.enumerate():
            if thread.name == "saver":
                thread.join()
        if step == self.first:
            self.full.enter_context(files_limited_to(self.size))
        if step == self.last:
            self.full.close()

    def closed(self) -> None:
        super().closed()
        self.full.close()


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_training_goes_on_and_the_previous_checkpoints_stay(tmp_path: Path) -> None:
    """Full during the saves of epochs 3 and 4 of 5: as if nothing had happened, but for two messages."""
    config = tiny_config(train={"epochs": 5})
    seen: dict[int, list[str]] = {}

    class Looking(DiskFull):
        def stepped(self, step: int) -> None:
            super().stepped(step)
            if step in (9, 13, 17):
                seen[step] = names(tmp_path / "run")

    disk = Looking(9, 17)
    train(tmp_path / "run", config, [disk])
    train(tmp_path / "straight", config)

    before = ["step-00000004.pt", "step-00000008.pt"]
    assert (seen[9], seen[13], seen[17]) == (before, before, before), "no temporary file is left either"
    assert names(tmp_path / "run") == ["step-00000008.pt", "step-00000020.pt"]
    assert len(disk.messages) == 2
    for message in disk.messages:
        assert "could not save a checkpoint" in message
        assert "training goes on" in message
    assert_same_run(tmp_path / "run", tmp_path / "straight")


def test_a_run_that_cannot_save_its_end_says_so_and_can_go_on(straight: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(
        PclError, match=r"could not save after step 8 .* last checkpoint is .*step-00000004\.pt"
    ):
        train(run, sinks=[DiskFull(5, 100)])
    assert names(run) == ["step-00000004.pt"]
    train(run)
    assert_same_run(run, straight)


class StoppedOnAFullDisk(DiskFull):
    """SIGTERM as soon as the disk is full."""

    def stepped(self, step: int) -> None:
        super().stepped(step)
        SignalAtStep(self.first).stepped(step)


def test_a_stop_that_cannot_be_saved_is_no_success(straight: Path, tmp_path: Path) -> None:
    with pytest.raises(PclError, match=r"could not save after step 6 .*step-00000004\.pt") as error:
        train(tmp_path / "run", sinks=[StoppedOnAFullDisk(6, 100)])
    assert error.value.exit_code == 1
    assert newest_checkpoint(tmp_path / "run")["progress"]["steps_done"] == 4
    train(tmp_path / "run")
    assert_same_run(tmp_path / "run", straight)


def test_metrics_that_cannot_be_written_are_kept_and_written_later(straight: Path, tmp_path: Path) -> None:
    """The limit falls into a line of metrics.jsonl; no checkpoint is due meanwhile."""
    disk = DiskFull(1, 7, size=100)
    config = tiny_config(train={"save_every": 2, "log_every": 2})
    whole: list[Any] = []

    class Reading(Watcher):
        def stepped(self, step: int) -> None:
            if step == 7:
                whole.extend(read_records(tmp_path / "run" / "metrics.jsonl"))

    train(tmp_path / "run", config, [Reading(), disk])
    train(tmp_path / "straight", config)
    written = read_records(tmp_path / "run" / "metrics.jsonl")
    assert whole == [], "nothing fitted while the disk was full"
    assert len(written) == 6
    assert timeless(written) == timeless(read_records(tmp_path / "straight" / "metrics.jsonl"))
    assert len(disk.messages) == 4, "steps 2, 4, 6 and the first epoch"
    assert all("JsonlSink could not write" in message for message in disk.messages)
