"""What all ranks meet is told by one of them."""

import os
import socket
from functools import partial
from pathlib import Path

import pytest

from pcl_fast.run_folder import RunFolder
from tests.dist.ranks import command, started
from tests.dist.training import (
    LOADER,
    OPENING,
    Fault,
    codes,
    poison_batch,
    run,
    said,
    sleep,
    start,
    training,
)
from tests.tiny import assert_same_run, newest_checkpoint


@pytest.mark.parametrize("rank", [0, 1])
def test_a_loss_that_is_not_finite_on_one_rank(
    photos: Path, straight: Path, tmp_path: Path, rank: int
) -> None:
    """Exit code 4 everywhere, one line that names step, term and rank, and nothing of it is kept."""
    path = tmp_path / "run"
    words = training(photos, path, "--train.save-steps", "1")
    outcomes = run(tmp_path, words, Fault(rank, OPENING, partial(poison_batch, 5)))
    assert codes(outcomes) == [4, 4], said(outcomes)
    assert outcomes[1].err == ""
    (line,) = outcomes[0].err.splitlines()
    assert line.startswith("pcl-fast: rank 0: error: step 5: not finite: ")
    assert f" on rank {rank}" in line
    assert f" on rank {1 - rank}" not in line
    assert line.endswith(f"The last checkpoint is {path}/checkpoints/step-00000004.pt")
    assert newest_checkpoint(path)["progress"]["steps_done"] == 4
    again = run(tmp_path, words)
    assert codes(again) == [0, 0], said(again)
    assert_same_run(path, straight)


def test_a_second_job_in_the_folder_is_refused_on_all_its_ranks(
    photos: Path, straight: Path, tmp_path: Path
) -> None:
    path = tmp_path / "run"
    words = training(photos, path)
    busy = Fault(1, LOADER, partial(sleep, 30), 2)
    with start(tmp_path / "first", words, busy) as first:
        metrics = RunFolder(path).metrics
        while not metrics.exists():
            assert first.processes[0].is_alive()
        holder = first.processes[0].pid
        second = run(tmp_path / "second", words, seconds=20)
        assert all(process.is_alive() for process in first.processes)
    assert codes(second) == [2, 2], said(second)
    assert second[1].err == ""
    told = (
        f"{path}: in use by process {holder} on {socket.gethostname()}; wait for it, or use another --run-dir"
    )
    assert second[0].err == f"pcl-fast: rank 0: error: {told}\n"
    again = run(tmp_path, words)
    assert codes(again) == [0, 0], said(again)
    assert_same_run(path, straight)


def test_a_number_of_ranks_that_is_not_there(photos: Path, tmp_path: Path) -> None:
    outcomes = run(tmp_path, training(photos, tmp_path / "run", "--ranks", "3"))
    assert codes(outcomes) == [2, 2], said(outcomes)
    assert outcomes[0].err.startswith(
        "pcl-fast: rank 0: error: --ranks 3: there is 2; start them with torchrun"
    )
    assert outcomes[0].err.count("\n") == 1
    assert outcomes[1].err == ""


def test_a_flag_that_there_is_not(photos: Path, tmp_path: Path) -> None:
    outcomes = run(tmp_path, training(photos, tmp_path / "run", "--train.epoch", "3"))
    assert codes(outcomes) == [2, 2], said(outcomes)
    (line,) = outcomes[0].err.splitlines()
    assert line.startswith("pcl-fast: rank 0: error: unrecognized options: --train.epoch, 3. Did you mean ")
    assert outcomes[1].err == ""


def test_what_each_rank_meets_before_it_meets_the_others(photos: Path, tmp_path: Path) -> None:
    """Each says so for itself: it may be its machine's fault only."""
    outcomes = run(tmp_path, training(photos, tmp_path / "run", "--data.val", "nowhere.beton"))
    assert codes(outcomes) == [3, 3], said(outcomes)
    for rank, outcome in enumerate(outcomes):
        assert outcome.err.startswith(f"pcl-fast: rank {rank}: error: nowhere.beton cannot be opened")
        assert outcome.err.count("\n") == 1


def other_words(words: list[str]) -> None:
    """The command, with a setting of its own on rank 1."""
    command([*words, "--optim.lr", "0.3"] if os.environ["RANK"] == "1" else words)


def test_ranks_with_other_settings_are_refused(photos: Path, tmp_path: Path) -> None:
    """Before anything is written; what may differ between machines may."""
    with started(tmp_path, 2, other_words, (training(photos, tmp_path / "run"),)) as ranks:
        outcomes = ranks.wait(30)
    assert codes(outcomes) == [2, 2], said(outcomes)
    (line,) = (outcomes[0].err + outcomes[1].err).splitlines()
    assert line.endswith("error: rank 1 has other settings than rank 0: optim.lr: 0.1 -> 0.3")
    assert not (tmp_path / "run").exists()
