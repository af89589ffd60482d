"""`pcl-fast profile PRESET`: the speed of a training step against the straightforward implementation.

`pcl-fast profile data FILE`, the speed of the loaders, is in profile_data.py.
"""

import importlib
import json
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from pcl_fast import __version__, atomic
from pcl_fast.build import build_state, describe_kernels
from pcl_fast.commands.data import opened_data
from pcl_fast.commands.settings import choose_with
from pcl_fast.config import Config
from pcl_fast.contract import ViewBatch, ended
from pcl_fast.errors import ConfigError
from pcl_fast.profile.baseline import BaselineStep, baseline_config
from pcl_fast.profile.timing import Timing, time_interleaved
from pcl_fast.step.train_step import Moment, train_step

MOMENT = Moment(step=1, lr=1e-3, distill_weight=1.0, ema_coefficient=0.999)


@dataclass(frozen=True, kw_only=True)
class ProfileOptions:
    """How to measure."""

    repeats: int = 7
    """Times each implementation is measured, in turn with the others."""
    steps: int = 2
    """Steps in each of these."""
    warmup: int = 2
    """Steps of each before the clock starts."""
    json: Path | None = None
    """Write everything measured to this file, too."""

    def __post_init__(self) -> None:
        """Validate."""
        for name in ("repeats", "steps", "warmup"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--profile.{name} {getattr(self, name)}: give at least 1")


def main(words: Sequence[str]) -> None:
    """Time the baseline's and the product's step on the same batches, and print both and their ratio."""
    if words[:1] == ["data"]:
        importlib.import_module("pcl_fast.commands.profile_data").main(words[1:])
        return
    chosen, options = choose_with("profile", words, ProfileOptions())
    console = Console()
    report: dict[str, Any] = {"date": datetime.now(UTC).isoformat(timespec="seconds"), **machine()}
    for config in {run.method: run for run, _ in chosen.runs}.values():
        timings = time_steps(config, options)
        console.print(timings_table(config, timings))
        report[config.method] = {
            "model": config.model,
            "batch_size": config.train.batch_size,
            "precision": config.amp.dtype,
            **{name: asdict(timing) for name, timing in timings.items()},
        }
    console.print(", ".join(f"{key} {value}" for key, value in machine().items()), highlight=False)
    if options.json is not None:
        atomic.write_text(options.json, json.dumps(report, indent=2) + "\n")


def time_steps(config: Config, options: ProfileOptions) -> dict[str, Timing]:
    """The baseline's step (float32, eager, view by view) and ours, as configured, interleaved."""
    device = torch.device(config.device)
    state = build_state(config)
    state.network.train()
    with opened_data(config, state.objective.num_views) as data, ended(data.train.epoch(0)) as batches:
        batch = next(batches)
    baseline = BaselineStep(baseline_config(config))
    plain_views = batch.views_VBCHW.float().contiguous()
    plain_batch = ViewBatch(plain_views, batch.labels_B, batch.sample_ids_B)
    steps: dict[str, Callable[[], object]] = {
        "baseline": lambda: baseline(plain_batch, MOMENT),
        "pcl_fast": lambda: train_step(state, batch, MOMENT),
    }
    return time_interleaved(steps, device, options.repeats, options.steps, options.warmup)


def timings_table(config: Config, timings: dict[str, Timing]) -> Table:
    """A row an implementation: milliseconds a step, images a second, times as fast as the baseline."""
    title = f"{config.method}: one training step of {config.model}, batch {config.train.batch_size}"
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for column in ("ms a step", "fastest - slowest", "images/s", "times as fast", "lowest - highest"):
        table.add_column(column, justify="right")
    for name, timing in timings.items():
        low, high = timing.ratio_spread
        table.add_row(
            name,
            f"{1e3 * timing.median:.1f}",
            f"{1e3 * min(timing.seconds):.1f} - {1e3 * max(timing.seconds):.1f}",
            f"{config.train.batch_size / timing.median:,.0f}",
            f"{timing.ratio:.2f}",
            f"{low:.2f} - {high:.2f}",
        )
    precision = f"{config.amp.dtype}, channels-last {config.channels_last}"
    ours = f"{precision}, kernels: {describe_kernels(config)}"
    table.caption = f"baseline: eager float32, view by view; pcl_fast: {ours}"
    return table


def machine() -> dict[str, str]:
    """Where and with what it was measured."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "cpu": _processor(),
        "threads": str(torch.get_num_threads()),
        "load": f"{os.getloadavg()[0]:.2f}",
        "gpu": gpu,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pcl_fast": __version__,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")
