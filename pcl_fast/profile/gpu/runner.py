"""Parts one after the other, each a process with a time limit of its own, until the time is up.

A part that raises, hangs, crashes or runs out of memory ends alone, and the rows that it had written are
kept. What its process has started ends with it.
"""

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TAIL = 4000  # characters kept of what a part printed, where it did not end well
LEAST = 15.0  # seconds left under which no part is begun: about what starting takes

Row = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """`command(rows, seconds)` is what to run: it adds its rows to that file, and has so many seconds."""

    name: str
    about: str
    limit: float
    command: Callable[[Path, float], Sequence[str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a part ended: `status` is `done`, or what happened; then `log` is the end of what it printed."""

    status: str
    seconds: float
    rows: list[Row]
    log: str = ""

    @property
    def done(self) -> bool:
        """Whether it came to its end."""
        return self.status == "done"


def run_parts(parts: Iterable[Part], seconds: float, report: Callable[[Part, Outcome], None]) -> None:
    """Run the parts in their order for at most so many seconds; `report` is called after each."""
    deadline = time.monotonic() + seconds
    for part in parts:
        left = deadline - time.monotonic()
        if left < min(LEAST, part.limit):
            status = f"not run: {max(left, 0):.0f} s were left of {seconds:.0f} s"
            report(part, Outcome(status=status, seconds=0.0, rows=[]))
        else:
            report(part, run_part(part, min(part.limit, left)))


def run_part(part: Part, limit: float) -> Outcome:
    """Run one part in a process of its own, for at most `limit` seconds."""
    with tempfile.TemporaryDirectory(prefix="pcl-fast-") as folder:
        rows, log = Path(folder) / "rows.jsonl", Path(folder) / "log"
        began = time.monotonic()
        with log.open("wb") as printed:
            status = _run(part.command(rows, limit), printed.fileno(), limit)
        seconds, text = time.monotonic() - began, log.read_text(errors="replace")
        tail = "" if status == "done" else text[-TAIL:]
        return Outcome(status=status, seconds=seconds, rows=_read_rows(rows), log=tail)


def _run(command: Sequence[str], output: int, limit: float) -> str:
    """Its status. The group, not a session, is new: who ends this session also ends the part."""
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, process_group=0
    )
    try:
        code = process.wait(limit)
    except subprocess.TimeoutExpired:
        return f"killed after {limit:.0f} s"
    finally:
        with contextlib.suppress(ProcessLookupError):  # all have ended
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # a driver may not let go of it
            process.wait(LEAST)
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    return "done" if code == 0 else f"failed with exit code {code}"


def _read_rows(path: Path) -> list[Row]:
    """Whole lines only: the last one may be torn."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]
    return [json.loads(line) for line in lines]


def add_row(path: Path, row: Row) -> None:
    """Add a row to a part's file; what stands there is kept whatever happens to the process."""
    with path.open("ab") as file:
        file.write(json.dumps(row).encode() + b"\n")
