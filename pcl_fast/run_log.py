"""starts.jsonl: when, where and with what each process of a run began, and how it ended."""

import datetime
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

import pcl_fast
from pcl_fast import atomic
from pcl_fast.commit import commit

Entry = dict[str, Any]


class RunLog:
    """The file `starts.jsonl` of a run folder: a JSON object a line for each start and each end of a process.

    A process that was killed or crashed leaves a start without an end. One process writes at a time: the
    holder of the folder. A disk that refuses never ends training: every method catches OSError and hands it
    to `say` as a line.
    """

    def __init__(self, run_dir: Path, say: Callable[[str], None]) -> None:
        self.path = run_dir / "starts.jsonl"
        self._say = say

    def started(self, *, step: int, **facts: str | int | None) -> None:
        """A process begins or goes on after `step`; `facts` (ranks, device, ...) are kept with it.

        Time, host, process, versions of pcl_fast and torch, and the commit are looked up here.
        """
        versions = {"pcl_fast": pcl_fast.__version__, "torch": str(torch.__version__)}
        self._append({"event": "started", "step": step} | facts | versions | {"commit": commit()})

    def ended(
        self, how: Literal["finished", "stopped", "failed"], step: int, message: str | None = None
    ) -> None:
        """It ends after `step`; `message` is what stopped it (SIGTERM), or what went wrong."""
        self._append({"event": "ended", "how": how, "step": step, "message": message})

    def previous(self) -> str | None:
        """A line about how the last process ended, to be asked for before `started`.

        None if there was none, or if it finished.
        """
        try:
            entries = read_entries(self.path)
        except OSError as error:
            self._say(f"could not read {self.path} ({error}); training goes on")
            return None
        return _describe(entries[-1]) if entries else None

    def _append(self, entry: Entry) -> None:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        who = {"time": now, "host": socket.gethostname(), "pid": os.getpid()}
        try:
            _append_line(self.path, json.dumps(who | entry).encode() + b"\n")
        except OSError as error:
            self._say(f"could not write {self.path} ({error}); training goes on")


def read_entries(path: Path) -> list[Entry]:
    """Every whole line of a starts.jsonl, oldest first; what a kill or a full disk has torn is left out."""
    entries: list[Entry] = []
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if line.endswith(b"\n") and isinstance(entry, dict):
            entries.append(entry)
    return entries


def _append_line(path: Path, line: bytes) -> None:
    """Append in one write, after a torn last line is cut off. OSError if the disk does not take all of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        whole = path.read_bytes().rfind(b"\n") + 1
        if whole != os.fstat(descriptor).st_size:
            os.ftruncate(descriptor, whole)
        written = os.write(descriptor, line)
        if written != len(line):
            os.ftruncate(descriptor, whole)
            raise OSError(f"only {written} of {len(line)} bytes fitted")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    atomic.sync(path.parent)


def _describe(last: Entry) -> str | None:
    """What a person should know of the last line of a log."""
    who = f"the last process (pid {last.get('pid')} on {last.get('host')})"
    step, message, how = last.get("step"), last.get("message"), last.get("how")
    if last.get("event") == "started":
        return f"{who} was killed or crashed after it began at step {step}"
    if how == "stopped":
        return f"{who} was stopped{f' by {message}' if message else ''} after step {step}"
    if how == "failed":
        reason = f": {' '.join(str(message).split())}" if message else ""
        return f"{who} failed after step {step}{reason}"
    return None
