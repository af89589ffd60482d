"""Real torchrun, as a user starts it: a killed worker is started again, Ctrl-C saves, one process goes on."""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path

import pytest

from pcl_fast import cli
from pcl_fast.run_log import read_entries
from pcl_fast.sinks import read_records
from tests.conftest import REPOSITORY
from tests.dist.training import codes, run, said, training
from tests.tiny import assert_same_run, newest_checkpoint

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
EPOCHS, STEPS_PER_EPOCH = 24, 3
LONG = ("--train.epochs", str(EPOCHS), "--train.eval-every", str(EPOCHS), "--train.save-steps", "2")


@pytest.fixture(scope="module")
def straight(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the long training that nothing disturbed."""
    folder = tmp_path_factory.mktemp("long")
    outcomes = run(folder, training(photos, folder / "run", *LONG))
    assert codes(outcomes) == [0, 0], said(outcomes)
    return folder / "run"


@contextlib.contextmanager
def torchrun(words: Sequence[str], *options: str) -> Generator[subprocess.Popen[str]]:
    """torchrun with the product's command, and nothing of it left behind."""
    variables = {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    child = subprocess.Popen(
        [*TORCHRUN, *options, "-m", "pcl_fast", *words],
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield child
    finally:
        if child.poll() is None:
            child.terminate()  # which it passes on to its workers
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.communicate(timeout=20)
        child.kill()
        child.communicate()


def wait_until(happens: Callable[[], bool], child: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not happens():
        assert time.monotonic() < deadline
        assert child.poll() is None, child.communicate()
        time.sleep(0.05)


def steps_of(path: Path) -> list[int]:
    return [record["step"] for record in read_records(path / "metrics.jsonl") if record["kind"] == "step"]


@pytest.mark.timeout(200)
def test_torchrun_starts_again_what_was_killed(photos: Path, straight: Path, tmp_path: Path) -> None:
    """The rank that holds the folder; torchrun's store, and its port, outlive all of them."""
    path = tmp_path / "run"
    with torchrun(training(photos, path, *LONG), "--max-restarts", "1") as child:
        wait_until(lambda: len(steps_of(path)) >= 4, child)
        os.kill(worker(child.pid, 0), signal.SIGKILL)
        out, err = child.communicate(timeout=120)
    assert child.returncode == 0, out + err
    assert "resuming after step" in out
    assert steps_of(path) == list(range(1, EPOCHS * STEPS_PER_EPOCH + 1))
    assert_same_run(path, straight)
    starts = [entry for entry in read_entries(path / "starts.jsonl") if entry["event"] == "started"]
    assert len(starts) == 2
    assert starts[1]["step"] >= 2


def worker(torchrun: int, rank: int) -> int:
    """The process of a rank."""
    children = Path(f"/proc/{torchrun}/task/{torchrun}/children").read_text().split()
    found = [
        int(child)
        for child in children
        if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
    ]
    assert len(found) == 1, children
    return found[0]


@pytest.mark.timeout(200)
def test_ctrl_c_saves_and_one_process_goes_on(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """torchrun has the last word, a traceback of its own, and exit code 1; ours is there before it."""
    path = tmp_path / "run"
    words = training(photos, path, *LONG)
    with torchrun(words) as child:
        wait_until(lambda: len(steps_of(path)) >= 4, child)
        os.kill(child.pid, signal.SIGINT)
        out, err = child.communicate(timeout=60)
    step = newest_checkpoint(path)["progress"]["steps_done"]
    assert 4 <= step < EPOCHS * STEPS_PER_EPOCH, out + err
    lines = [line for line in err.splitlines() if not line.startswith("W")]
    assert lines[0] == f"pcl-fast: rank 0: stopped by SIGINT after step {step}; everything is saved"
    assert shlex.split(lines[1].removeprefix("to go on:  "))[-len(words) :] == words
    assert sum("pcl-fast:" in line for line in lines) == 1

    assert cli.main(training(photos, path, *LONG, ranks=2)) == 0
    assert f"resuming after step {step} of {EPOCHS * STEPS_PER_EPOCH}" in capsys.readouterr().out
    records = read_records(path / "metrics.jsonl")
    assert steps_of(path) == list(range(1, EPOCHS * STEPS_PER_EPOCH + 1))
    assert records[-1]["val"]["ensemble"]["top1"] >= 0
    last = read_entries(path / "starts.jsonl")[-2:]
    assert [entry["event"] for entry in last] == ["started", "ended"]
    assert (last[0]["ranks"], last[0]["step"], last[1]["how"]) == (1, step, "finished")
