"""Every start and every end of a process of a run is in its log, and the log never stops a run."""

import datetime
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import pcl_fast
from pcl_fast.commit import commit
from pcl_fast.run_log import RunLog, read_entries
from tests.conftest import REPOSITORY
from tests.tiny import files_limited_to

KILLED = """
import os, pathlib, signal, sys
from pcl_fast.run_log import RunLog

RunLog(pathlib.Path(sys.argv[1]), print).started(step=40, ranks=2)
os.kill(os.getpid(), signal.SIGKILL)
"""

HERE = f"the last process (pid {os.getpid()} on {socket.gethostname()})"


@pytest.fixture
def log(tmp_path: Path) -> RunLog:
    return RunLog(tmp_path, pytest.fail)


def strict_lines(path: Path) -> list[dict[str, Any]]:
    """Every line, as any other reader of such files would see it."""
    text = path.read_text()
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def test_there_was_no_process_before_the_first(log: RunLog) -> None:
    assert log.previous() is None
    assert not log.path.exists()


def test_a_start_says_when_where_and_with_what(log: RunLog) -> None:
    before = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
    log.started(step=40, ranks=2, device="cuda:0", note=None)
    (entry,) = strict_lines(log.path)
    time = datetime.datetime.fromisoformat(entry.pop("time"))
    assert before <= time <= datetime.datetime.now(datetime.UTC)
    assert time.utcoffset() == datetime.timedelta(0)
    assert entry.pop("commit") == commit()
    assert entry == {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "event": "started",
        "step": 40,
        "ranks": 2,
        "device": "cuda:0",
        "note": None,
        "pcl_fast": pcl_fast.__version__,
        "torch": torch.__version__,
    }


@pytest.mark.parametrize(
    ("how", "message", "expected"),
    [
        ("finished", None, None),
        ("stopped", "SIGTERM", " was stopped by SIGTERM after step 50"),
        ("stopped", None, " was stopped after step 50"),
        ("failed", "no room\n  on the disk", " failed after step 50: no room on the disk"),
        ("failed", None, " failed after step 50"),
    ],
)
def test_how_the_last_one_ended(log: RunLog, how: Any, message: str | None, expected: str | None) -> None:
    log.started(step=1)
    log.started(step=40)
    log.ended(how, 50, message)
    assert log.previous() == (None if expected is None else HERE + expected)
    assert [entry["event"] for entry in strict_lines(log.path)] == ["started", "started", "ended"]


def test_a_start_without_an_end_was_killed(log: RunLog) -> None:
    log.started(step=0)
    log.ended("finished", 10)
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, log.path.parent],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
    )
    assert process.wait(50) == -signal.SIGKILL
    host = socket.gethostname()
    expected = (
        f"the last process (pid {process.pid} on {host}) was killed or crashed after it began at step 40"
    )
    assert log.previous() == expected


def test_a_torn_last_line_is_left_out_and_cut_off_by_the_next(log: RunLog) -> None:
    """Cut at every byte of the last line, as by a kill or a full disk."""
    log.started(step=1)
    log.ended("stopped", 2, "SIGTERM")
    kept = strict_lines(log.path)
    begin = log.path.stat().st_size
    log.started(step=2)
    whole = log.path.read_bytes()
    for length in range(begin, len(whole)):
        log.path.write_bytes(whole[:length])
        assert read_entries(log.path) == kept
        assert log.previous() == f"{HERE} was stopped by SIGTERM after step 2"
        log.ended("failed", 3)
        assert strict_lines(log.path)[:-1] == kept
        assert log.previous() == f"{HERE} failed after step 3"


@pytest.mark.parametrize("begin", [b"", b"\xff\xfe{}\n", b"[1]\n", b"\n", b'{"event": "started", "st'])
def test_lines_of_others_do_not_disturb(log: RunLog, begin: bytes) -> None:
    log.path.write_bytes(begin)
    assert log.previous() is None
    log.started(step=7)
    assert [entry["step"] for entry in read_entries(log.path)] == [7]
    assert log.previous() == f"{HERE} was killed or crashed after it began at step 7"


def test_a_full_disk_is_said_and_no_more(tmp_path: Path) -> None:
    """Limits that fall before, into and behind the second line."""
    said: list[str] = []
    log = RunLog(tmp_path, said.append)
    log.started(step=1)
    first = log.path.read_bytes()
    for limit in (0, 10, len(first), len(first) + 1, len(first) + 50):
        with files_limited_to(limit):
            log.ended("failed", 9)
        assert log.path.read_bytes() == first, "whole lines only"
        assert len(said) == 1
        assert "starts.jsonl" in said[0]
        assert said.pop().endswith("; training goes on")
    log.ended("finished", 10)
    assert [entry["event"] for entry in strict_lines(log.path)] == ["started", "ended"]
    assert said == []


def test_a_log_that_cannot_be_opened_is_said_and_no_more(tmp_path: Path) -> None:
    said: list[str] = []
    log = RunLog(tmp_path, said.append)
    log.path.mkdir()
    assert log.previous() is None
    log.started(step=1)
    log.ended("finished", 2)
    assert len(said) == 3
    assert all("starts.jsonl" in line and line.endswith("; training goes on") for line in said)
