"""What has been found so far: the JSON file of a GPU's measurements, and rows looked up in it."""

import json
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pcl_fast import atomic
from pcl_fast.errors import DataError
from pcl_fast.profile.ceilings import Ceilings
from pcl_fast.profile.gpu.device import measured_ceilings
from pcl_fast.profile.gpu.runner import Outcome, Part, Row

FILE = "gpu.json"
DONE = "done"


class Found:
    """Outcomes of parts by their names, in the order they were first met; each with its date and commit."""

    def __init__(self, parts: dict[str, Row] | None = None) -> None:
        self.parts: dict[str, Row] = parts or {}

    @classmethod
    def load(cls, path: Path) -> "Found":
        """What a file holds; nothing if there is none. DataError for a file that is something else."""
        if not path.exists():
            return cls()
        try:
            parts = json.loads(path.read_text())["parts"]
            assert all("rows" in part and "status" in part for part in parts.values())
        except (ValueError, KeyError, TypeError, AttributeError, AssertionError):
            raise DataError(
                f"{path}: not measurements of a GPU; move it away, or give another --out"
            ) from None
        return cls(parts)

    def save(self, path: Path) -> None:
        """Write everything, wholly or not at all."""
        atomic.write_text(path, json.dumps({"parts": self.parts}, indent=1) + "\n")

    def put(self, part: Part, outcome: Outcome, about: Mapping[str, str]) -> None:
        """Keep how a part ended; `about` says when, by which command, of which commit."""
        self.parts[part.name] = {"about": part.about, "limit": part.limit, **about, **asdict(outcome)}

    @property
    def ceilings(self) -> Ceilings:
        """Of the device, as measured."""
        return measured_ceilings([row for part in self.parts.values() for row in part["rows"]])

    def rows(self, what: str, **wanted: Any) -> Iterator[Row]:
        """The rows of a kind with these values, without those that failed or could not be."""
        for part in self.parts.values():
            for row in part["rows"]:
                good = "failed" not in row and "refused" not in row
                if good and row["what"] == what and all(row.get(key) == wanted[key] for key in wanted):
                    yield row

    def row(self, what: str, **wanted: Any) -> Row | None:
        """The first such row."""
        return next(self.rows(what, **wanted), None)

    def median(self, what: str, key: str = "seconds", **wanted: Any) -> float | None:
        """The median of the samples of the first such row."""
        row = self.row(what, **wanted)
        return None if row is None else statistics.median(row[key])

    def troubles(self) -> Iterator[str]:
        """What failed, could not be or was not run, a line each."""
        for name, part in self.parts.items():
            if part["status"] != DONE:
                yield f"{name}: {part['status']}"
            for row in part["rows"]:
                reason = row.get("failed") or row.get("refused")
                if reason:
                    yield f"{name}: {_title(row)}: {reason}"


def _title(row: Row) -> str:
    """What a row is of, in words."""
    words = [
        str(value)
        for key, value in row.items()
        if isinstance(value, str | int) and key not in ("failed", "refused", "bytes", "forward_bytes")
    ]
    return " ".join(words)
