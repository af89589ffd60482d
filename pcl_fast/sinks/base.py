"""The contract of a sink, and what a run says of itself."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

Record = dict[str, Any]
"""A line of metrics.jsonl. `kind` is `step` (means over the last steps) or `epoch` (means over the epoch,
under `val` the accuracy and calibration of every head, and under `between` what each pair of them has in
common, if there is more than one; under `held_out` what the method has concluded from images held out, if
it wants some); both have `epoch` (0-based), `step` (from 1), `lr`, `distill_weight`, `ema_coefficient`,
`loss`, `terms`, `train_top1`, `gradient_norm`, `images_per_second`."""


@dataclass(frozen=True, slots=True)
class RunInfo:
    """What a sink must know before the first record.

    In a resumed run `first_step` steps are done, and `first_record` records of metrics.jsonl belong to
    them.
    """

    title: str
    run_dir: Path
    epochs: int
    steps_per_epoch: int
    first_step: int
    first_record: int
    headline: dict[str, str]

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self.epochs * self.steps_per_epoch


class Sink(Protocol):
    """Receives what happens in a run, in order; must not change it.

    An OSError of `recorded`, `said` or `closed` (a full disk) does not end the run, but is said.
    """

    def started(self, info: RunInfo) -> None:
        """The run begins, or goes on after `info.first_step` steps."""
        ...

    def stepped(self, step: int) -> None:
        """A step is done (called after every one)."""
        ...

    def recorded(self, record: Record) -> None:
        """A new record."""
        ...

    def said(self, message: str) -> None:
        """Something a person should read."""
        ...

    def closed(self) -> None:
        """The run has ended, well or badly."""
        ...
