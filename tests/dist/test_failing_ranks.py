"""One of two ranks fails: its own words on its stderr, one line of the other, and whole files."""

import re
import socket
import time
from functools import partial
from pathlib import Path

import pytest

from pcl_fast.checkpoint import is_intact
from pcl_fast.run_folder import RunFolder
from pcl_fast.run_log import read_entries
from tests.dist.ranks import Outcome, started
from tests.dist.training import (
    LOADER,
    OPENING,
    SINK,
    STEP,
    Fault,
    codes,
    fail_by,
    run,
    said,
    training,
    without_an_agent,
)
from tests.tiny import assert_same_run, newest_checkpoint

BUG = ValueError("a defect\nin two lines")
SAVING_OFTEN = ("--train.save-steps", "1")
FAULTS = [
    pytest.param(Fault(1, LOADER, partial(fail_by, BUG), 3), "waiting for data", id="in a loader"),
    pytest.param(Fault(0, LOADER, partial(fail_by, BUG), 3), "waiting for data", id="in the first's loader"),
    pytest.param(Fault(1, STEP, partial(fail_by, BUG), 3), "training", id="in a step"),
    pytest.param(Fault(0, SINK, partial(fail_by, BUG), 3), "training", id="in a sink"),
]


def check_words(outcomes: list[Outcome], fails: int, phase: str) -> None:
    """The rank that fails shows where, the other says in one line which one has failed, and why."""
    assert codes(outcomes) == [1, 1], said(outcomes)
    failed, other = outcomes[fails].err, outcomes[1 - fails].err
    assert failed.startswith(f"pcl-fast: rank {fails} fails in step 3 ({phase}):\nTraceback (most recent")
    assert failed.endswith("ValueError: a defect\nin two lines\n")
    assert failed.count("Traceback") == 1
    lost = rf"pcl-fast: rank {1 - fails}: error: lost another rank in step 3 \((.*)\): rank {fails}: (.*)\n"
    found = re.fullmatch(lost, other)
    assert found, other
    assert found[1] in ("training", "waiting for data", "saving")
    assert found[2] == "ValueError: a defect in two lines"


def check_files(path: Path, steps: int) -> None:
    """Both checkpoints are whole, and the log of starts says why it ended."""
    folder = RunFolder(path)
    assert [is_intact(checkpoint) for checkpoint in folder.checkpoints.paths()] == [True, True]
    assert newest_checkpoint(path)["progress"]["steps_done"] == steps
    last = read_entries(path / "starts.jsonl")[-1]
    assert (last["event"], last["how"]) == ("ended", "failed")
    assert "a defect" in last["message"]


@pytest.mark.parametrize(("fault", "phase"), FAULTS)
def test_a_bug_on_one_rank_ends_all(photos: Path, tmp_path: Path, fault: Fault, phase: str) -> None:
    path, began = tmp_path / "run", time.monotonic()
    outcomes = run(tmp_path, training(photos, path, *SAVING_OFTEN), fault, seconds=20)
    assert time.monotonic() - began < 20
    check_words(outcomes, fault.rank, phase)
    check_files(path, steps=2)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("fails", [0, 1])
def test_without_torchrun_it_is_the_same(photos: Path, straight: Path, tmp_path: Path, fails: int) -> None:
    """Then the first rank holds the store through which they tell each other."""
    path = tmp_path / "run"
    words = training(photos, path, *SAVING_OFTEN)
    fault = Fault(fails, STEP, partial(fail_by, BUG), 3)
    with started(tmp_path, 2, without_an_agent, (free_port(), words, [fault])) as ranks:
        check_words(ranks.wait(20), fails, "training")
    check_files(path, steps=2)
    with started(tmp_path, 2, without_an_agent, (free_port(), words, [])) as ranks:
        outcomes = ranks.wait(30)
    assert codes(outcomes) == [0, 0], said(outcomes)
    assert_same_run(path, straight)


def test_what_fails_on_one_rank_while_the_other_opens_its_data(photos: Path, tmp_path: Path) -> None:
    fault = Fault(1, OPENING, partial(fail_by, BUG))
    outcomes = run(tmp_path, training(photos, tmp_path / "run"), fault, seconds=20)
    assert codes(outcomes) == [1, 1], said(outcomes)
    assert outcomes[1].err.startswith("pcl-fast: rank 1 fails in opening data:\nTraceback")
    lost = "lost another rank in opening data: rank 1: ValueError: a defect in two lines"
    assert outcomes[0].err == f"pcl-fast: rank 0: error: {lost}\n"
