"""curves.png: loss terms and accuracies over a run, or several runs side by side."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pcl_fast import atomic
from pcl_fast.sinks.base import Record, RunInfo
from pcl_fast.sinks.jsonl import evaluations, read_records

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

REDRAW_SECONDS = 60.0


def draw_curves(
    path: Path, runs: Mapping[str, Sequence[Record]], headlines: Mapping[str, Mapping[str, str]]
) -> None:
    """Draw `runs` (title to records) into `path`.

    Left the test accuracy of each run's headline results (and thin, its other heads if it is alone),
    right the loss terms of each kind.
    """
    from matplotlib.figure import Figure  # its first import writes a cache of fonts

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    accuracy, losses = figure.subplots(1, 2)
    for title, records in runs.items():
        epochs = [record for record in records if record["kind"] == "epoch"]
        _draw_accuracy(
            accuracy, title if len(runs) > 1 else "", epochs, headlines[title], alone=len(runs) == 1
        )
        _draw_losses(losses, title if len(runs) > 1 else "", epochs)
    accuracy.set(xlabel="epoch", ylabel="test top-1 (%)", title="Test accuracy")
    losses.set(xlabel="epoch", ylabel="mean over the epoch", title="Loss terms (training)", yscale="log")
    for axes in (accuracy, losses):
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small")
    save_figure(figure, path)


def _draw_accuracy(
    axes: "Axes", title: str, epochs: list[Record], headline: Mapping[str, str], *, alone: bool
) -> None:
    measured = evaluations(epochs)
    if not measured:
        return
    at = [record["epoch"] + 1 for record in measured]
    named = set(headline.values())
    others = [head for head in measured[0]["val"] if head not in named]
    marker = line_or_points(at)
    for head in others if alone else []:
        values = [r["val"][head]["top1"] for r in measured]
        axes.plot(at, values, marker, linewidth=0.8, alpha=0.6, label=head)
    for label, head in headline.items():
        shown = f"{title}: {label}" if title else label
        axes.plot(at, [r["val"][head]["top1"] for r in measured], marker, linewidth=2, label=shown)


def _draw_losses(axes: "Axes", title: str, epochs: list[Record]) -> None:
    """One curve for each kind of term (`ce`, `pe`, `pm`): the mean over its peers."""
    kinds = dict.fromkeys(name.split("/")[0] for record in epochs for name in record["terms"])
    at = [record["epoch"] + 1 for record in epochs]
    for kind in kinds:
        of_kind = [[v for name, v in r["terms"].items() if name.split("/")[0] == kind] for r in epochs]
        means = [sum(values) / len(values) for values in of_kind]
        axes.plot(at, means, line_or_points(at), label=f"{title} {kind}".strip())


def line_or_points(at: Sequence[int]) -> str:
    """How a curve is drawn: no line goes through one point."""
    return "o" if len(at) == 1 else "-"


def save_figure(figure: "Figure", path: Path) -> None:
    """Write a figure as PNG, wholly or not at all."""
    with atomic.replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


class CurvesSink:
    """Redraws a run's curves.png from its metrics.jsonl, at most once a minute, and at the end."""

    def __init__(self, path: Path, metrics: Path) -> None:
        self.path, self.metrics = path, metrics
        self._drawn = time.monotonic()

    def started(self, info: RunInfo) -> None:
        """Remember the run's title and headline."""
        self._info = info

    def stepped(self, step: int) -> None:
        """Nothing changes within an epoch."""

    def recorded(self, record: Record) -> None:
        """Redraw after an epoch, if the last drawing is old."""
        if record["kind"] == "epoch" and time.monotonic() - self._drawn > REDRAW_SECONDS:
            self._draw()

    def said(self, message: str) -> None:
        """Nothing: messages are for people."""

    def closed(self) -> None:
        """Draw the whole run."""
        self._draw()

    def _draw(self) -> None:
        draw_curves(
            self.path, {self._info.title: read_records(self.metrics)}, {self._info.title: self._info.headline}
        )
        self._drawn = time.monotonic()
