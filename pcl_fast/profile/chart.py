"""A bar chart of how fast variants train."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from pcl_fast import atomic

DOTS_PER_INCH = 120
WIDTH, ROW, FRAME = 9.0, 0.45, 1.2  # inches: of the picture, of a bar, of title and axis together
BAR, FLOOR = "tab:blue", "tab:red"


def draw_rates(
    path: Path, rates: Mapping[str, Sequence[float]], title: str, floor: float | None = None
) -> None:
    """Draw a bar for each variant into a PNG: the median of its images a second, and its whole spread.

    `rates` has one value or more for each; the first is drawn at the top. `floor`, images a second, is what
    the hardware would allow: a line.
    """
    from matplotlib.figure import Figure  # its first import writes a cache of fonts

    figure = Figure(figsize=(WIDTH, FRAME + ROW * len(rates)), layout="constrained")
    axes = figure.subplots()
    medians = [statistics.median(values) for values in rates.values()]
    below = [median - min(values) for median, values in zip(medians, rates.values(), strict=True)]
    above = [max(values) - median for median, values in zip(medians, rates.values(), strict=True)]
    bars = axes.barh(list(rates), medians, xerr=[below, above], color=BAR, capsize=3, height=0.6)
    axes.bar_label(bars, [f" {median:,.0f}" for median in medians], padding=4)
    if floor is not None:
        axes.axvline(floor, color=FLOOR, linestyle="--", label=f"fused-byte floor: {floor:,.0f}")
        axes.legend(fontsize="small", loc="lower right", bbox_to_anchor=(1.0, 1.0), frameon=False)
    axes.invert_yaxis()
    axes.set_axisbelow(True)
    axes.set(xlabel="images / s", xlim=(0, 1.15 * max([*medians, floor or 0.0])))
    axes.set_title(title, loc="left")
    axes.grid(axis="x", alpha=0.3)
    with atomic.replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=DOTS_PER_INCH)
