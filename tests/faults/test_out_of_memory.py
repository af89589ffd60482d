"""A step that does not fit into memory: one line that says what to give instead, and whole files."""

import re
from functools import partial
from pathlib import Path

import pytest
import torch

from pcl_fast.checkpoint import is_intact
from pcl_fast.run_folder import RunFolder
from tests.dist.ranks import Outcome
from tests.dist.training import STEP, Fault, codes, fail_by, run, said, training, write_photos
from tests.tiny import newest_checkpoint


def allocate_too_much() -> None:
    """More than any machine has; torch's allocator on the CPU refuses."""
    torch.empty(1 << 60)


ADVICE = re.compile(
    r"pcl-fast: rank (?P<rank>\d): error: out of memory on cpu \((?P<reason>[^\n]*)\): weights, momentum and "
    r"averages take \d+ MiB\. Give --train\.batch-size 1 \(and --optim\.lr 0\.05 with it\), "
    r"train on twice as many ranks, or leave out a peer\n"
)
DEEDS = [
    pytest.param(
        partial(fail_by, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")),
        "CUDA out of memory",
        id="a GPU's",
    ),
    pytest.param(allocate_too_much, "can't allocate memory", id="the CPU's"),
]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos"))


def advised(outcome: Outcome, reason: str) -> str:
    """Check the line of advice, which is all that a rank has said; returns which rank."""
    found = ADVICE.fullmatch(outcome.err)
    assert found, outcome.err
    assert reason in found["reason"]
    return found["rank"]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("deed", "reason"), DEEDS)
def test_one_line_of_advice_and_whole_checkpoints(
    photos: Path, tmp_path: Path, deed: partial[None], reason: str, rank: int
) -> None:
    path = tmp_path / "run"
    words = training(photos, path, "--train.save-steps", "1")
    outcomes = run(tmp_path, words, Fault(rank, STEP, deed, 4), seconds=20)
    assert codes(outcomes) == [1, 1], said(outcomes)
    assert advised(outcomes[rank], reason) == str(rank)
    lost = f"pcl-fast: rank {1 - rank}: error: lost another rank in step 4"
    assert outcomes[1 - rank].err.startswith(lost)
    assert f"rank {rank}: PclError: out of memory on cpu" in outcomes[1 - rank].err
    assert outcomes[1 - rank].err.count("\n") == 1
    assert newest_checkpoint(path)["progress"]["steps_done"] == 3
    assert [is_intact(file) for file in RunFolder(path).checkpoints.paths()] == [True, True]


def test_another_error_of_torch_is_no_lack_of_memory(photos: Path, tmp_path: Path) -> None:
    deed = partial(fail_by, RuntimeError("shapes do not fit"))
    outcomes = run(tmp_path, training(photos, tmp_path / "run"), Fault(1, STEP, deed, 2), seconds=20)
    assert outcomes[1].code == 1
    assert "Traceback" in outcomes[1].err
    assert outcomes[1].err.endswith("RuntimeError: shapes do not fit\n")
    assert "out of memory" not in said(outcomes)
