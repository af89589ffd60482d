"""One of two ranks hangs or is killed: the other does not wait for ever, and says for whom."""

import re
import signal
import time
from functools import partial
from pathlib import Path

import pytest

from pcl_fast.checkpoint import is_intact
from pcl_fast.run_folder import RunFolder
from tests.dist.ranks import started
from tests.dist.test_failing_ranks import free_port
from tests.dist.training import (
    LOADER,
    RESTORING,
    SAVING,
    STEP,
    Fault,
    codes,
    get_signal,
    run,
    said,
    sleep,
    training,
    without_an_agent,
)
from tests.tiny import assert_same_run

PATIENCE = ("--dist.timeout", "3", "--train.save-steps", "1")
NO_PROGRESS = r"pcl-fast: rank {}: no progress for 3 s in (.*); elsewhere rank {}: (.*)\n"
LOST = r"pcl-fast: rank {}: (?:error: )?lost another rank in (.*): rank {}: no progress for 3 s in (.*); else"


def check_places(err: str, rank: int, place: str, elsewhere: str) -> None:
    """The rank has found out by itself, or heard of it from the other, and names where both are."""
    other = 1 - rank
    alone = re.search(NO_PROGRESS.format(rank, other), err)
    told = re.search(LOST.format(rank, other), err)
    found = alone or told
    assert found, err
    assert found.groups() == (place, elsewhere), err


@pytest.mark.parametrize(
    ("place", "phase"), [(STEP, "training"), (LOADER, "waiting for data")], ids=["in a step", "in its loader"]
)
def test_a_sleeping_rank_ends_all_and_all_say_where_they_are(
    photos: Path, straight: Path, tmp_path: Path, place: str, phase: str
) -> None:
    path, began = tmp_path / "run", time.monotonic()
    words = training(photos, path, *PATIENCE)
    outcomes = run(tmp_path, words, Fault(1, place, partial(sleep, 60), 3), seconds=20)
    assert time.monotonic() - began < 15
    assert codes(outcomes) == [1, 1], said(outcomes)
    for rank, places in enumerate([("step 3 (training)", f"step 3 ({phase})")] * 2):
        check_places(outcomes[rank].err, rank, places[rank], places[1 - rank])
    main = outcomes[1].err.split("Thread 0x")[-1]
    assert re.search(r"training.py\", line \d+ in sleep\n", main), "the traceback of what hangs"
    checkpoints = RunFolder(path).checkpoints.paths()
    assert [is_intact(checkpoint) for checkpoint in checkpoints] == [True, True]
    again = run(tmp_path, words)
    assert codes(again) == [0, 0], said(again)
    assert_same_run(path, straight)


PLACES = {"restoring": RESTORING, "step": STEP, "save": SAVING}


@pytest.mark.parametrize("killed", [0, 1])
@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_a_killed_rank_ends_the_other_in_seconds(
    photos: Path, tmp_path: Path, place: str, killed: int
) -> None:
    path, began = tmp_path / "run", time.monotonic()
    fault = Fault(killed, place, partial(get_signal, signal.SIGKILL))
    outcomes = run(tmp_path, training(photos, path, *PATIENCE), fault, seconds=15)
    assert time.monotonic() - began < 10
    left = outcomes[1 - killed]
    assert (outcomes[killed].code, left.code) == (-signal.SIGKILL, 1), said(outcomes)
    lost = rf"pcl-fast: rank {1 - killed}: error: lost another rank in .*: it has gone without a word"
    assert re.fullmatch(lost + r" \(.*\)\n", left.err), left.err


def test_a_killed_rank_that_held_the_store(photos: Path, tmp_path: Path) -> None:
    """Torch has more to say then, after which there is our line."""
    words = training(photos, tmp_path / "run", *PATIENCE)
    fault = Fault(0, STEP, partial(get_signal, signal.SIGKILL), 2)
    with started(tmp_path, 2, without_an_agent, (free_port(), words, [fault])) as ranks:
        outcomes = ranks.wait(15)
    assert codes(outcomes) == [-signal.SIGKILL, 1], said(outcomes)
    assert "lost another rank in step 2 (training): it has gone without" in outcomes[1].err.splitlines()[-1]


@pytest.mark.parametrize("missing", [0, 1])
def test_a_rank_that_never_comes(photos: Path, tmp_path: Path, missing: int) -> None:
    """Whoever waits for it ends as well."""
    began = time.monotonic()
    words = training(photos, tmp_path / "run", *PATIENCE)
    fault = Fault(missing, "pcl_fast.dist:find_place", partial(get_signal, signal.SIGKILL))
    outcomes = run(tmp_path, words, fault, seconds=15)
    assert time.monotonic() - began < 10
    left = outcomes[1 - missing]
    assert left.code == 1, said(outcomes)
    line = left.err.splitlines()[-1]
    assert line.startswith(f"pcl-fast: rank {1 - missing}: error: cannot meet the others at ")
    who = "rank 1 has not" if missing else "not all have"
    assert line.endswith(f": {who} come within 3 s; start all 2 ranks with torchrun")
