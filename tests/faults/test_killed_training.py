"""Two ranks, killed twenty times at random moments: what is reached in the end is what nothing disturbed."""

import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pcl_fast.run_log import read_entries
from pcl_fast.sinks import read_records
from tests.dist.ranks import Ranks
from tests.dist.training import STEPS_PER_EPOCH, codes, run, said, start, training, write_photos
from tests.tiny import assert_same_run

KILLS, EPOCHS = 20, 16
STEPS = EPOCHS * STEPS_PER_EPOCH
MORE = ("--train.epochs", str(EPOCHS), "--train.eval-every", "4", "--train.save-steps", "2")
PATIENCE = 10.0  # seconds without progress, which a rank needs when both cores are taken
BOTH = -1


def moments(draws: random.Random) -> Iterator[tuple[int, int, float]]:
    """Who is killed, after how many new records, and how many seconds later."""
    for _ in range(KILLS):
        who = draws.choice([BOTH, BOTH, BOTH, 0, 1])
        records = draws.choice([0, 1, 1, 2, 3])
        yield who, records, draws.uniform(0, 0.2 if records else 1.2)


def wait_until(happens: Callable[[], bool], ranks: Ranks) -> None:
    deadline = time.monotonic() + 30
    while not happens():
        assert time.monotonic() < deadline, "no step in 30 s"
        assert all(process.is_alive() for process in ranks.processes), "one has ended by itself"
        time.sleep(0.01)


def last_step(path: Path) -> int:
    return max((record["step"] for record in read_records(path / "metrics.jsonl")), default=0)


def kill(ranks: Ranks, who: int) -> None:
    """SIGKILL; a rank that is left ends by itself."""
    if who == BOTH:
        ranks.kill()
        return
    ranks.signal(who, signal.SIGKILL)
    left = ranks.wait(PATIENCE + 10)[1 - who]
    assert left.code == 1, left
    words = ("lost another rank", "no progress", "cannot meet the others")
    assert any(word in left.err for word in words), left.err


def check_starts(path: Path, pids: list[int]) -> None:
    """Each start that has got as far as to train is told, in order; only the last one has an end."""
    entries = read_entries(path / "starts.jsonl")
    begun = [entry["pid"] for entry in entries if entry["event"] == "started"]
    assert begun == [pid for pid in pids if pid in begun]
    assert begun[-1] == pids[-1]
    assert (entries[-1]["event"], entries[-1]["how"], entries[-1]["step"]) == ("ended", "finished", STEPS)
    assert len(begun) >= KILLS // 2
    assert all(entry["ranks"] == 2 for entry in entries if entry["event"] == "started")


@pytest.mark.timeout(300)
def test_kill_9_at_twenty_random_moments_changes_nothing(tmp_path: Path) -> None:
    photos, path, straight = write_photos(tmp_path / "photos"), tmp_path / "run", tmp_path / "straight"
    outcomes = run(tmp_path, training(photos, straight, *MORE), seconds=100)
    assert codes(outcomes) == [0, 0], said(outcomes)

    seed = random.SystemRandom().randrange(1000)
    print("seed of the moments:", seed)  # shown when the test fails
    words, pids = training(photos, path, *MORE, "--dist.timeout", str(PATIENCE)), list[int]()
    for who, records, delay in moments(random.Random(seed)):
        wanted = last_step(path) + records
        with start(tmp_path, words) as ranks:
            pids.append(ranks.processes[0].pid)
            if records:
                wait_until(lambda wanted=wanted: last_step(path) >= min(wanted, STEPS - 1), ranks)
            time.sleep(delay)
            kill(ranks, who)
    with start(tmp_path, words) as ranks:
        pids.append(ranks.processes[0].pid)
        outcomes = ranks.wait(60)
    assert codes(outcomes) == [0, 0], said(outcomes)

    lines = (path / "metrics.jsonl").read_bytes().splitlines()
    records_read = read_records(path / "metrics.jsonl")
    assert len(lines) == len(records_read), "every line is whole"
    steps = [record["step"] for record in records_read if record["kind"] == "step"]
    assert steps == list(range(1, STEPS + 1)), "no step is there twice or missing"
    assert_same_run(path, straight)
    check_starts(path, pids)
