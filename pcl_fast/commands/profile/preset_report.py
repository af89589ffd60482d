"""What `pcl-fast profile PRESET` has found, in lines, in a file, in a picture."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from pcl_fast.config import Config
from pcl_fast.objectives import make_objective
from pcl_fast.profile.binding import binding
from pcl_fast.profile.chart import draw_rates
from pcl_fast.profile.comparison import Plan, Row, fastest_of_ours
from pcl_fast.profile.roofline import StepFloor
from pcl_fast.profile.timing import Timing

NOTHING = "-"


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """Everything measured of one method: a row a variant, beside the floor of its step."""

    config: Config
    rows: list[Row]
    floor: StepFloor
    steps_per_epoch: int
    plan: Plan

    @property
    def batch_size(self) -> int:
        """Images a step."""
        return self.config.train.batch_size

    @property
    def num_views(self) -> int:
        """Views of an image."""
        return make_objective(self.config).num_views

    @property
    def title(self) -> str:
        """The method, the network, the batch, the device."""
        views = f"{self.num_views} view{'s' * (self.num_views > 1)}"
        config = self.config
        return f"{config.method}: {config.model}, batch {self.batch_size} x {views}, {config.device}"

    @property
    def device_name(self) -> str:
        """What computes, in a word."""
        return "GPU" if torch.device(self.config.device).type == "cuda" else "CPU"

    def epoch_seconds(self, row: Row) -> float | None:
        """Of an epoch, projected from the steps measured."""
        return None if row.step is None else self.steps_per_epoch * row.step.median


def headline(found: Findings) -> str | None:
    """The epoch of the fastest of ours against that of the first variant; None without both."""
    first, best = next((row for row in found.rows if row.step), None), fastest_of_ours(found.rows)
    if first is None or first.step is None or best is None or best.step is None or best is first:
        return None
    low, high = best.step.ratio_spread
    how = "projected" if best.end_to_end else "projected, computing alone"
    return (
        f"an epoch ({how}): {first.name} {number(found.epoch_seconds(first))} s, "
        f"{best.name} {number(found.epoch_seconds(best))} s: "
        f"{times(best.step.ratio)} times as fast ({times(low)} - {times(high)})"
    )


def verdict(found: Findings) -> str | None:
    """What binds the fastest of ours; None if its data were not measured."""
    best = fastest_of_ours(found.rows)
    if best is None or best.rates is None:
        return None
    return f"{best.name} is {binding(best.rates, found.device_name)}"


def report_of(found: Findings) -> dict[str, Any]:
    """Everything measured, for a JSON file."""
    config = found.config
    return {
        "model": config.model,
        "dataset": config.data.dataset,
        "backend": config.data.backend,
        "device": config.device,
        "batch_size": found.batch_size,
        "views": found.num_views,
        "peers": make_objective(config).num_peers,
        "precision": config.amp.dtype,
        "channels_last": config.channels_last,
        "steps_per_epoch": found.steps_per_epoch,
        "repeats": found.plan.repeats,
        "warmup_steps": found.plan.warmup,
        "floor": asdict(found.floor),
        "reference": next((row.name for row in found.rows if row.step), None),
        "variants": {row.name: _variant(found, row) for row in found.rows},
        "headline": headline(found),
        "verdict": verdict(found),
    }


def draw(found: Findings, path: Path) -> None:
    """A bar for each variant that was measured: images a second, in training if there were data."""
    rates = {row.name: [found.batch_size / s for s in row.step.seconds] for row in found.rows if row.step}
    if rates:
        draw_rates(path, rates, found.title, found.batch_size / found.floor.seconds["fused"])


def _variant(found: Findings, row: Row) -> dict[str, Any]:
    parts = {"compute": row.compute, "data": row.data, "end_to_end": row.end_to_end}
    seconds = None if row.compute is None else row.compute.median
    return {
        "about": row.about,
        "refused": row.refused,
        "said": row.said,
        "warmup_seconds": row.warmup,
        "memory_bytes": row.memory,
        **{name: _timing(found, timing) for name, timing in parts.items()},
        "epoch_seconds_projected": found.epoch_seconds(row),
        "idle_for_data": None if row.rates is None else row.rates.waiting,
        "counts": None if row.counts is None else asdict(row.counts),
        "mfu": None if seconds is None else found.floor.mfu(seconds),
        "share_of_fused_floor": None if seconds is None else found.floor.share(seconds),
    }


def _timing(found: Findings, timing: Timing | None) -> dict[str, Any] | None:
    if timing is None:
        return None
    images = found.batch_size / timing.median
    rates = {"images_per_second": images, "views_per_second": images * found.num_views}
    return asdict(timing) | {"median_seconds": timing.median} | rates


def times(ratio: float) -> str:
    """How many times, to three digits."""
    return f"{ratio:.2f}" if ratio < 10 else f"{ratio:.1f}"


def number(value: float | None) -> str:
    """Three digits at least."""
    if value is None:
        return NOTHING
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}" if value < 1e6 else f"{value / 1e6:.3g}M"
