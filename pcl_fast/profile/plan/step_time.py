"""The step of one GPU: measured, where a file says so, else projected from the floor of its network."""

from pathlib import Path
from typing import Any

from pcl_fast.config import Config
from pcl_fast.errors import ConfigError
from pcl_fast.profile.plan.basis import Basis, told
from pcl_fast.profile.plan.gpus import GPUS, Gpu, find_gpu, named_in
from pcl_fast.profile.plan.measured import MeasuredStep, StepTime
from pcl_fast.profile.plan.reports import not_such, read_report
from pcl_fast.profile.plan.suite import FLAG, read_suite
from pcl_fast.profile.roofline import StepFloor, StepWork
from pcl_fast.profile.variants import BASELINES

COMMAND = "pcl-fast profile PRESET --json FILE"
DEFAULT_GPU = "h200"


def projected_step(floor: StepFloor, share: float) -> StepTime:
    """The fused floor over the share of it that is taken to be reached, or that of its kernels if longer."""
    seconds = max(floor.seconds["fused"] / share, floor.graph_seconds["batched"])
    ceilings = floor.ceilings
    source = (
        f"{share:.0%} of the fused floor, taken; {told(ceilings.flops / 1e12)} TFLOP/s, "
        f"{told(ceilings.bandwidth / 1e12)} TB/s: {ceilings.source}"
    )
    return StepTime(seconds=seconds, basis=Basis("projected", source))


def read_step(path: Path, config: Config, work: StepWork) -> MeasuredStep:
    """Our fastest variant, computing alone, of a file that `pcl-fast profile PRESET` or `gpu` wrote.

    Raises:
        ConfigError: if it is no such file, of another network, batch, precision or method, of a CPU, or
            holds baselines only.
    """
    report = read_report(path, FLAG, COMMAND)
    try:
        if "parts" in report:
            return read_suite(path, report, config, work)
        return _read(path, report, _method(path, report, config, work), work)
    except ConfigError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, StopIteration):
        raise not_such(path, FLAG, COMMAND) from None


def gpu_of(name: str | None, measured: MeasuredStep | None) -> Gpu:
    """The GPU asked for; by default the one measured on. ConfigError if they are different ones."""
    if measured is None:
        return find_gpu(name or DEFAULT_GPU)
    on = named_in(measured.device)
    if on is None:
        raise ConfigError(f"{FLAG}: measured on {measured.device}; plans are for {', '.join(GPUS)}")
    if name is not None and find_gpu(name) != on:
        raise ConfigError(f"--gpu {name}: the step was measured on {measured.device}; give {on.name}")
    return on


def _method(path: Path, report: dict[str, Any], config: Config, work: StepWork) -> dict[str, Any]:
    """What was measured of the method, if it is of the same run."""
    methods = {key: each for key, each in report.items() if isinstance(each, dict) and "variants" in each}
    if not methods:
        raise not_such(path, FLAG, COMMAND)
    found = methods.get(config.method, {})
    wanted = {
        "model": config.model,
        "batch_size": config.train.batch_size,
        "views": work.num_views,
        "peers": work.num_peers,
        "precision": config.amp.dtype,
    }
    if not found:
        others = ", ".join(methods)
        raise ConfigError(f"{FLAG} {path}: measured with method {others}, this run has {config.method}")
    for key, value in wanted.items():
        if found.get(key) != value:
            what = key.replace("_", " ")
            raise ConfigError(f"{FLAG} {path}: measured with {what} {found.get(key)}, this run has {value}")
    return found


def _read(path: Path, report: dict[str, Any], found: dict[str, Any], work: StepWork) -> MeasuredStep:
    if not found["device"].startswith("cuda"):
        raise ConfigError(
            f"{FLAG} {path}: measured on {found['device']}; measure on a GPU like those planned"
        )
    if found["floor"]["flops"] != work.flops:
        raise ConfigError(
            f"{FLAG} {path}: measured with {told(found['floor']['flops'] / 1e9)} GFLOP a step, this run has "
            f"{told(work.flops / 1e9)}: another image size, or other classes, peers or branches"
        )
    variants: dict[str, dict[str, Any]] = found["variants"]
    timed = {
        name: float(each["compute"]["median_seconds"])
        for name, each in variants.items()
        if name not in BASELINES and each["compute"] and not each["refused"]
    }
    if not timed:
        raise ConfigError(
            f"{FLAG} {path}: none of ours was measured; give `pcl-fast profile` --against eager"
        )
    best = min(timed, key=lambda name: timed[name])
    memory = variants[best]["memory_bytes"]
    source = f"{path.name}: {best} on one {report['gpu']}, computing alone, {report['date'][:10]}"
    time = StepTime(
        seconds=timed[best],
        basis=Basis("measured", source),
        memory=None if memory is None else int(memory),
    )
    return MeasuredStep(time=time, device=str(report["gpu"]))
