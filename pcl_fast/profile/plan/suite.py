"""A measured step out of the file of `pcl-fast profile gpu`, with steps of many networks."""

import dataclasses
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pcl_fast.config import Config, PclConfig
from pcl_fast.errors import ConfigError
from pcl_fast.profile.plan.basis import Basis, told
from pcl_fast.profile.plan.measured import MeasuredStep, StepTime
from pcl_fast.profile.roofline import StepWork, step_work
from pcl_fast.profile.variants import BASELINES

FLAG = "--step"


def read_suite(path: Path, report: dict[str, Any], config: Config, work: StepWork) -> MeasuredStep:
    """The fastest of ours, on noise, of a network and batch.

    Raises:
        ConfigError: if there is none, or of another image size, precision, or number of classes or peers.
        KeyError, TypeError, AttributeError, ValueError: if the file is something else.
    """
    model, batch = config.model, config.train.batch_size
    of_network = {"model": model, "batch": batch}
    ours = {"method": config.method, "augmented": False, **of_network}
    steps = [row for row in _rows(report, what="step", **ours) if row["mode"] not in BASELINES]
    if not steps:
        known = sorted({f"{row['model']} @{row['batch']}" for row in _rows(report, what="step")})
        has = ", ".join(known) or "no steps"
        raise ConfigError(f"{FLAG} {path}: holds {has}; this run has {model} @{batch}, {config.method}")
    _compare(path, report, config, work)
    best = min(steps, key=lambda row: statistics.median(row["seconds"]))
    machine = next(_rows(report, what="machine"))
    date = next(part["date"] for part in report["parts"].values() if best in part["rows"])
    source = f"{path.name}: {best['mode']} on one {machine['gpu']}, computing alone, {date[:10]}"
    time = StepTime(
        seconds=statistics.median(best["seconds"]),
        basis=Basis("measured", source),
        memory=best.get("peak_bytes"),
    )
    return MeasuredStep(time=time, device=machine["gpu"])


def _compare(path: Path, report: dict[str, Any], config: Config, work: StepWork) -> None:
    """The file says FLOPs of PCL's step alone: that of the method as it is by default, in bfloat16."""
    if config.amp.dtype != "bfloat16":
        raise ConfigError(f"{FLAG} {path}: measured in bfloat16, this run has {config.amp.dtype}")
    same = work
    if config.method != "pcl":
        same = step_work(dataclasses.replace(config, method="pcl", pcl=PclConfig()))
    wanted = {"model": config.model, "batch": config.train.batch_size, "method": "pcl"}
    flops = next((row["flops"] for row in _rows(report, what="floor", **wanted)), None)
    if flops != same.flops:
        was = "-" if flops is None else told(flops / 1e9)
        raise ConfigError(
            f"{FLAG} {path}: measured with {was} GFLOP a step, this run has {told(same.flops / 1e9)}: "
            "another image size, or other classes, peers or branches"
        )


def _rows(report: dict[str, Any], **wanted: Any) -> Iterator[dict[str, Any]]:
    """Those with these values that neither failed nor could not be."""
    for part in report["parts"].values():
        for row in part["rows"]:
            good = "failed" not in row and "refused" not in row
            if good and all(row.get(key) == value for key, value in wanted.items()):
                yield row
