"""Figures of records, and what they are over the seeds of a group."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pcl_fast.commands.compare import spread
from pcl_fast.commands.report.runs import FoundRun, Group
from pcl_fast.sinks import Record

Measure = Callable[[Record], float | None]
"""A figure of an epoch's record; None where it was not written down."""

BETWEEN = {"agreement": "same answer (share)", "kl": "KL (nats)", "distance": "distance of predictions"}
KINDS = {
    "peers": "between peers",
    "mean_teachers": "between mean teachers",
    "ensemble": "between ensemble and peers",
}


@dataclass(frozen=True, slots=True)
class Curve:
    """A figure by epoch (from 1): the mean over the seeds that have it, and their spread (0 of one)."""

    at: list[int]
    mean: list[float]
    spread: list[float]


def curve(runs: Sequence[FoundRun], measure: Measure) -> Curve:
    """A measure at each epoch at which any of the runs has it."""
    values: dict[int, list[float]] = {}
    for run in runs:
        for record in run.epochs:
            value = measure(record)
            if value is not None:
                values.setdefault(record["epoch"] + 1, []).append(value)
    at = sorted(values)
    means = [statistics.fmean(values[epoch]) for epoch in at]
    return Curve(at, means, [spread(values[epoch]) or 0.0 for epoch in at])


def last_values(group: Group, measure: Measure) -> list[float]:
    """A measure at the last evaluation of each run that counts, where it was written down."""
    found = [measure(run.last) for run in group.counted if run.last is not None]
    return [value for value in found if value is not None]


def loss(record: Record) -> float | None:
    """The training loss: the sum of all terms."""
    return record["loss"]


def of_head(head: str, name: str) -> Measure:
    """`top1` or `ece` of a head."""
    return lambda record: record.get("val", {}).get(head, {}).get(name)


def since(epoch: int, measure: Measure) -> Measure:
    """A measure from an epoch (counted from 1) on."""
    return lambda record: measure(record) if record["epoch"] + 1 >= epoch else None


def of_pairs(kind: str, name: str) -> Measure:
    """A measure of BETWEEN, the mean over all pairs of a kind; None where there is no such pair."""

    def measure(record: Record) -> float | None:
        between = record.get("between")
        if between is None:
            return None
        heads: list[str] = between["heads"]
        values = [between[name][i][j] for i, j in pairs_of(kind, heads)]
        return statistics.fmean(values) if values else None

    return measure


def pairs_of(kind: str, heads: Sequence[str]) -> list[tuple[int, int]]:
    """Which rows and columns are of a kind: both ways between alike heads, from the ensemble to each peer."""
    peers = [n for n, head in enumerate(heads) if head.startswith("peer")]
    if kind == "ensemble":
        return [(heads.index("ensemble"), peer) for peer in peers] if "ensemble" in heads else []
    teachers = [n for n, head in enumerate(heads) if head.startswith("mean_teacher")]
    alike = peers if kind == "peers" else teachers
    return [(i, j) for i in alike for j in alike if i != j]
