"""`pcl-fast profile PRESET`: the speed of training against the straightforward implementation.

`pcl-fast profile data FILE`, the speed of the loaders, is in data.py; `pcl-fast profile gpu`, all
measurements of a GPU, in gpu.py.
"""

import dataclasses
import importlib
import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from pcl_fast import atomic
from pcl_fast.build import AMP_DTYPES
from pcl_fast.commands.profile.preset_report import Findings, draw, report_of
from pcl_fast.commands.profile.preset_sources import opened_sources
from pcl_fast.commands.profile.preset_tables import print_findings
from pcl_fast.commands.settings import choose_with
from pcl_fast.config import Config
from pcl_fast.errors import ConfigError
from pcl_fast.profile.ceilings import Ceilings, find_ceilings
from pcl_fast.profile.comparison import Plan, compare
from pcl_fast.profile.machine import machine
from pcl_fast.profile.noise import steps_of_noise
from pcl_fast.profile.roofline import step_floor, step_work
from pcl_fast.profile.variants import BASELINES, variant_config


@dataclass(frozen=True, kw_only=True)
class ProfileOptions:
    """What to measure, and how. Each flag may be given without `profile.`, as `--against`."""

    against: str = ""
    """Variants, with commas between; others are compared with the first. baseline: the straightforward
    implementation; baseline-amp: the same with autocast and channels-last; ours: eager, compiled, captured,
    captured-compiled. By default the baselines and ours as it would train, on a GPU also uncaptured."""
    repeats: int = 5
    """Times each is measured, in turn with the others."""
    steps: int | None = None
    """Steps in each of these; by default as many as take a second on a GPU, 0.4 on a CPU."""
    warmup: int = 2
    """Steps of each before the clock starts, at least."""
    json: Path | None = None
    """Write everything measured to this file, too."""
    chart: Path | None = None
    """Draw images a second into this PNG."""
    trace: Path | None = None
    """Write what a few steps of the fastest of ours do to this file, for chrome://tracing or Perfetto."""

    def __post_init__(self) -> None:
        """Validate."""
        for name in ("repeats", "steps", "warmup"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--profile.{name} {value}: give at least 1")

    def names(self, config: Config) -> list[str]:
        """The variants, each once, in the order given."""
        if self.against:
            return list(dict.fromkeys(self.against.replace(" ", "").split(",")))
        ways = ["compiled"] if config.compile else ["eager"]
        if config.capture == "on":
            ways.append("captured-compiled" if config.compile else "captured")
        return [*BASELINES, *ways]

    def plan(self, trace: Path | None) -> Plan:
        """The measurement's part of these."""
        return Plan(repeats=self.repeats, steps=self.steps, warmup=self.warmup, trace=trace)


def main(words: Sequence[str]) -> None:
    """Measure the variants of each method of the preset; print tables and what binds, write files."""
    if words and words[0] in ("data", "gpu"):
        importlib.import_module(f"pcl_fast.commands.profile.{words[0]}").main(words[1:])
        return
    chosen, options = choose_with("profile", _long_names(words), ProfileOptions())
    console, head = Console(), machine()
    configs = {run.method: run for run, _ in chosen.runs}
    teacher = chosen.runs[-1][0].kd.teacher
    if "kd" in configs and (teacher is None or not teacher.exists()):
        raise ConfigError("--method kd: a step needs its teacher; give --kd.teacher, the folder of its run")
    for config in configs.values():
        for name in options.names(config):
            variant_config(name, config)  # which are unknown is said before anything is measured
    report: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["pcl-fast", "profile", *words]),
        **head,
    }
    ceilings = _ceilings(next(iter(configs.values())))
    for method, config in configs.items():
        of_method = _names_of_files(options, method if len(configs) > 1 else None)
        found = measure(config, of_method, ceilings, console)
        print_findings(found, console)
        report[method] = report_of(found)
        if of_method.chart is not None:
            draw(found, of_method.chart.expanduser())
        if options.json is not None:
            atomic.write_text(options.json.expanduser(), json.dumps(report, indent=2) + "\n")
    console.print(", ".join(f"{key} {value}" for key, value in head.items()), highlight=False, soft_wrap=True)


def measure(config: Config, options: ProfileOptions, ceilings: Ceilings, console: Console) -> Findings:
    """Everything about one method.

    Raises:
        ConfigError: if none of the variants can be.
        DataError: if the data set cannot be used.
    """
    names = options.names(config)
    floor = step_floor(step_work(config), ceilings)
    trace = options.trace and options.trace.expanduser()

    def say(message: str) -> None:
        line = f"{config.method}: {message}"
        console.print(line, style="dim", highlight=False, markup=False, soft_wrap=True)

    with opened_sources(config, names) as sources:
        rows = compare(config, names, sources, options.plan(trace), say)
        if not any(row.step for row in rows):
            raise ConfigError(f"--against {','.join(names)}: none can be measured here ({rows[0].refused})")
        loader = next((sources[name].loader for name in names if name in sources), None)
        steps = loader.steps_per_epoch if loader else steps_of_noise(config)
    return Findings(config=config, rows=rows, floor=floor, steps_per_epoch=steps, plan=options.plan(trace))


def _long_names(words: Sequence[str]) -> list[str]:
    """`--against` and its like as the parser knows them: `--profile.against`."""
    short = {f"--{field.name}" for field in dataclasses.fields(ProfileOptions)}
    return [
        f"--profile.{word.removeprefix('--')}" if word.partition("=")[0] in short else word for word in words
    ]


def _names_of_files(options: ProfileOptions, method: str | None) -> ProfileOptions:
    """With several methods, each has pictures and traces of its own: speed-pcl.png."""
    if method is None:
        return options
    named = {
        kind: path.with_stem(f"{path.stem}-{method}")
        for kind in ("chart", "trace")
        if (path := getattr(options, kind)) is not None
    }
    return dataclasses.replace(options, **named)


def _ceilings(config: Config) -> Ceilings:
    """Of the device, in the precision of ours; measured while nothing else runs, where it is not known."""
    return find_ceilings(torch.device(config.device), AMP_DTYPES[config.amp.dtype])
