"""Where a figure of a plan comes from, and the rows that figures are told in."""

from dataclasses import dataclass
from typing import Literal

# given: a flag, a preset or a file says so; computed: it follows exactly; measured: by a run of `pcl-fast
# profile`; projected: from a model, or from something that was measured elsewhere.
Kind = Literal["given", "computed", "measured", "projected"]


@dataclass(frozen=True, slots=True)
class Basis:
    """How a figure is known, and from what."""

    kind: Kind
    source: str


@dataclass(frozen=True, slots=True)
class Row:
    """A figure in words, with its basis; `part` is what of the run it belongs to."""

    part: str
    what: str
    value: str
    basis: Basis


def told(value: float) -> str:
    """Three digits at least: 0.0123, 45.6, 1,234."""
    return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"


def amount(size: float) -> str:
    """Bytes in words: 141 MB."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= unit:
            return f"{told(size / unit)} {name}"
    return f"{told(size)} bytes"


def duration(seconds: float) -> str:
    """Seconds in words: 2.5 ms, 28 s, 4.2 minutes, 7.1 hours."""
    for unit, name in ((3600.0, "hours"), (60.0, "minutes"), (1.0, "s")):
        if seconds >= (unit if unit == 1 else 2 * unit):
            return f"{told(seconds / unit)} {name}"
    return f"{told(1e3 * seconds)} ms"
