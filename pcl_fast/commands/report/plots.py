"""The pictures of a report: curves of all groups, and the pairs of heads of a run."""

import math
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from pcl_fast.commands.report.measures import (
    BETWEEN,
    KINDS,
    Measure,
    curve,
    loss,
    of_head,
    of_pairs,
    since,
)
from pcl_fast.commands.report.runs import FoundRun, Group
from pcl_fast.sinks import line_or_points

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Paul Tol's `muted` without its grey: told apart with any colour vision.
COLOURS = ("#332288", "#CC6677", "#117733", "#88CCEE", "#882255", "#DDCC77", "#44AA99", "#AA4499", "#999933")
DASHES = ("-", "--", "-.", ":")
MARKERS = ("", "o", "s", "^", "D")  # of the first groups, and of those that have the same colours again
WIDTH, ROW = 13.0, 3.8  # inches
LEGEND_ROW, LEGEND_LETTER, LEGEND_LINE = 0.24, 0.09, 0.7  # inches
ANNOTATED = 9  # heads, at most, whose figures are written into their squares


def draw_results(groups: Sequence[Group]) -> "Figure":
    """Test accuracy of every group's results, the same where it ends, and the training loss."""
    figure, axes = _panels(1, 3, _results(groups))
    whole, end, losses = axes[0]
    longest = max(run.done for group in groups for run in group.runs)
    for number, group in enumerate(groups):
        evaluated = any(run.last is not None for run in group.runs)
        _draw(losses, group, loss, number, label=None if evaluated else group.label)
    _draw_results(whole, groups, "top1")
    _draw_results(end, groups, "top1", first=longest - longest // 3)
    whole.set(title="Test accuracy", ylabel="top-1 (%)")
    end.set(title="Test accuracy, last third", ylabel="top-1 (%)")
    losses.set(title="Training loss, sum of all terms", ylabel="nats an image")
    return _finished(figure, axes)


def draw_calibration(groups: Sequence[Group]) -> "Figure | None":
    """The calibration error of every group's results; None if none has written it down."""
    figure, axes = _panels(1, 1, _results(groups))
    _draw_results(axes[0][0], groups, "ece")
    axes[0][0].set(title="Expected calibration error", ylabel="ECE (%)")
    axes[0][0].set_ylim(bottom=0)
    return _finished(figure, axes) if axes[0][0].lines else None


def draw_between(groups: Sequence[Group]) -> "Figure | None":
    """A row a measure, a column a kind of pair: the mean over its pairs; None if there is no pair."""
    kinds = [kind for kind in KINDS if any(_has(group, kind) for group in groups)]
    if not kinds:
        return None
    shown = [group.label for group in groups if any(_has(group, kind) for kind in kinds)]
    figure, axes = _panels(len(BETWEEN), len(kinds), shown, share_rows=True)
    for row, (name, label) in zip(axes, BETWEEN.items(), strict=True):
        for each, kind in zip(row, kinds, strict=True):
            for number, group in enumerate(groups):
                _draw(each, group, of_pairs(kind, name), number, label=group.label)
        row[0].set(ylabel=label, yscale="log" if name == "kl" else "linear")
    for each, kind in zip(axes[0], kinds, strict=True):
        each.set_title(KINDS[kind][0].upper() + KINDS[kind][1:])
    return _finished(figure, axes)


def draw_pairs(run: FoundRun) -> "Figure | None":
    """Heat maps of all pairs of heads at a run's last evaluation; None without pairs."""
    from matplotlib.figure import Figure

    between = None if run.last is None else run.last.get("between")
    if between is None:
        return None
    heads = [re.sub(r"(\d+)$", r" \1", head.replace("_", " ")) for head in between["heads"]]
    figure = Figure(figsize=(WIDTH, 2.2 + 0.28 * len(heads)), layout="constrained")
    for axes, (name, label) in zip(figure.subplots(1, len(BETWEEN)), BETWEEN.items(), strict=True):
        image = axes.imshow(_without_diagonal(between[name]), cmap="cividis")
        axes.set(title=label[0].upper() + label[1:])
        axes.set_xticks(range(len(heads)), heads, rotation=90, fontsize="small")
        axes.set_yticks(range(len(heads)), heads if name == "agreement" else [], fontsize="small")
        axes.tick_params(length=0)
        figure.colorbar(image, ax=axes, fraction=0.046)
        if len(heads) <= ANNOTATED:
            _annotate(axes, between[name])
    return figure


def _without_diagonal(matrix: Sequence[Sequence[float]]) -> list[list[float]]:
    """A head beside itself, which would take up most of the colours, is left blank."""
    return [[math.nan if i == j else value for j, value in enumerate(row)] for i, row in enumerate(matrix)]


def _annotate(axes: "Axes", matrix: Sequence[Sequence[float]]) -> None:
    """Each figure in its square, light on dark or dark on light."""
    others = [value for i, row in enumerate(matrix) for j, value in enumerate(row) if i != j]
    middle, digits = (min(others) + max(others)) / 2, 3 if max(others) < 0.2 else 2
    for i, row in enumerate(matrix):
        for j, value in enumerate(row):
            if i != j:
                colour = "black" if value > middle else "white"
                text = f"{value:.{digits}f}"
                axes.text(j, i, text, ha="center", va="center", color=colour, fontsize="x-small")


def _panels(
    rows: int, columns: int, labels: Sequence[str], share_rows: bool = False
) -> tuple["Figure", list[list["Axes"]]]:
    """A figure of panels, with room below them for a legend of these labels."""
    from matplotlib.figure import Figure

    legend = LEGEND_ROW * math.ceil(len(labels) / _legend_columns(labels))
    height = ROW * rows * (1 if rows == 1 else 0.72) + legend
    figure = Figure(figsize=(WIDTH, height + 0.2), layout="constrained")
    axes = figure.subplots(
        rows, columns, squeeze=False, sharex=rows > 1, sharey="row" if share_rows else False
    )
    return figure, axes.tolist()


def _legend_columns(labels: Iterable[str]) -> int:
    """As many as the longest label leaves room for, up to four."""
    longest = max((len(label) for label in labels), default=0)
    return max(1, min(4, int(WIDTH / (LEGEND_LINE + LEGEND_LETTER * longest))))


def _finished(figure: "Figure", axes: list[list["Axes"]]) -> "Figure":
    """Grids, whole epochs, and one legend below everything."""
    handles: dict[str, Artist] = {}
    for each in (each for row in axes for each in row):
        each.grid(alpha=0.3)
        each.locator_params(axis="x", integer=True)
        found, labels = each.get_legend_handles_labels()
        handles |= dict(zip(labels, found, strict=True))
    for each in axes[-1]:
        each.set_xlabel("epoch")
    if handles:
        columns = _legend_columns(handles)
        place = "outside lower center"
        figure.legend(handles.values(), handles.keys(), loc=place, ncols=columns, frameon=False)
    return figure


def _results(groups: Sequence[Group]) -> list[str]:
    return [_label(group, result) for group in groups for result in group.headline]


def _label(group: Group, result: str) -> str:
    return group.label if len(group.headline) == 1 else f"{group.label}: {result}"


def _draw_results(axes: "Axes", groups: Sequence[Group], name: str, first: int = 0) -> None:
    """The first result of a group as a line, others broken; from an epoch on."""
    for number, group in enumerate(groups):
        for place, (result, head) in enumerate(group.headline.items()):
            measure, dashes = since(first, of_head(head, name)), DASHES[place % len(DASHES)]
            _draw(axes, group, measure, number, dashes, _label(group, result))


def _draw(
    axes: "Axes", group: Group, measure: Measure, number: int, dashes: str = "-", label: str | None = None
) -> None:
    """The mean over a group's seeds, and a band of their spread; nothing without a figure."""
    found = curve(group.runs, measure)
    if not found.at:
        return
    colour, again = COLOURS[number % len(COLOURS)], number // len(COLOURS)
    alone = line_or_points(found.at) == "o"
    marker = MARKERS[again % len(MARKERS)] or ("o" if alone else "")
    every = max(1, len(found.at) // 8)
    drawn = axes.plot(found.at, found.mean, dashes, color=colour, label=label)
    drawn[0].set(marker=marker, markevery=every, markersize=5)
    if any(found.spread):
        low, high = (
            [m + sign * s for m, s in zip(found.mean, found.spread, strict=True)] for sign in (-1, 1)
        )
        axes.fill_between(found.at, low, high, color=colour, alpha=0.18, linewidth=0)


def _has(group: Group, kind: str) -> bool:
    return bool(curve(group.runs, of_pairs(kind, "kl")).at)
