"""metrics.jsonl: one JSON object a line, the whole history of a run."""

import json
from collections.abc import Sequence
from pathlib import Path

from pcl_fast import atomic
from pcl_fast.errors import DataError
from pcl_fast.sinks.base import Record, RunInfo


def read_records(path: Path) -> list[Record]:
    """All whole records of a metrics file; a line torn by a kill, and what follows it, is left out."""
    records: list[Record] = []
    if not path.exists():
        return records
    for line in path.read_text().splitlines(keepends=True):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break
        if not line.endswith("\n"):
            break
        records.append(record)
    return records


def evaluations(records: Sequence[Record]) -> list[Record]:
    """Those of an evaluated epoch."""
    return [record for record in records if "val" in record]


def check_whole(path: Path) -> None:
    """DataError naming the first line of a metrics file that is not a record; one without an end may be last.

    A process that was killed leaves such a last line; anything else is damage.
    """
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    for number, line in enumerate(lines, 1):
        if number == len(lines) and not line.endswith(b"\n"):
            return
        try:
            record = json.loads(line)
            whole = {"kind", "epoch", "step", "loss"} <= record.keys()
        except (ValueError, AttributeError):
            whole = False
        if not whole:
            raise DataError(
                f"{path}: line {number} is damaged; cut the file before it, or go on with the run, "
                "which writes what follows its checkpoint anew"
            )


class JsonlSink:
    """Appends every record; a resumed run first drops the records past its checkpoint."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def started(self, info: RunInfo) -> None:
        """Keep the first `info.first_record` records, and append from there."""
        kept = read_records(self.path)[: info.first_record]
        atomic.write_text(self.path, "".join(json.dumps(record) + "\n" for record in kept))
        self._file = self.path.open("ab", buffering=0)
        self._whole, self._unwritten = self.path.stat().st_size, b""

    def stepped(self, step: int) -> None:
        """Nothing: a step alone is not a record."""

    def recorded(self, record: Record) -> None:
        """Append a line, at once visible to readers; one that the disk refuses is kept for the next time."""
        self._unwritten += json.dumps(record).encode() + b"\n"
        self._append()

    def said(self, message: str) -> None:
        """Nothing: messages are for people."""

    def closed(self) -> None:
        """Close the file."""
        with self._file:
            self._append()

    def _append(self) -> None:
        self._file.truncate(self._whole)  # a full disk may have taken half a line
        rest = memoryview(self._unwritten)
        while rest:
            rest = rest[self._file.write(rest) :]
        self._whole += len(self._unwritten)
        self._unwritten = b""
