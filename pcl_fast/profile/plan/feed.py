"""How many images a second a core of the host prepares: measured, or as one core of ours did."""

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pcl_fast.config import Backend, Config
from pcl_fast.errors import ConfigError
from pcl_fast.profile.plan.basis import Basis
from pcl_fast.profile.plan.reports import not_such, read_report

FLAG, COMMAND = "--loaders", "pcl-fast profile data FILE --backends ... --json FILE"

# Images a second of two cores with 1 to 4 views of 224 pixels: docs/measurements.md, "ImageNet: loaders".
# ffcv: decoding alone, as with a GPU that makes the views; dali and torch: with views made on the CPU.
MEASURED_ON = "two cores of an AMD EPYC (Zen 4, virtual), 2026-11-23, docs/measurements.md"
CORES = 2
RATES: dict[Backend, tuple[float, ...]] = {
    "ffcv": (1274, 1237, 1241, 1254),
    "dali": (878, 795, 741, 712),
    "torch": (420, 317, 257, 227),
}
HOW: dict[Backend, str] = {
    "ffcv": "FFCV decodes, views are made on the GPU",
    "dali": "DALI decodes and makes views on the CPU; on the GPU not measured",
    "torch": "PIL and torchvision in a DataLoader",
}
# What may stand for a backend in a file, the better first.
ENTRIES: dict[Backend, tuple[str, ...]] = {
    "ffcv": ("ffcv-host", "ffcv"),
    "dali": ("dali",),
    "torch": ("torch",),
}


@dataclass(frozen=True, slots=True)
class Feed:
    """Images a second of one core, all views of each."""

    rate: float
    basis: Basis


def find_feed(config: Config, views: int, path: Path | None) -> Feed | None:
    """The rate of a resolved configuration's loader, from a file if one is given.

    None where nothing is loaded: the data set lies in the GPU's memory, or is noise.

    Raises:
        ConfigError: if the file is no such file, or not of this loader, number of views or image size.
    """
    backend = config.data.backend
    if backend not in RATES:
        return None
    if path is not None:
        return _read(path, config, views)
    source = f"{HOW[backend]}: {MEASURED_ON}; yours is another"
    return Feed(_two_cores(RATES[backend], views) / CORES, Basis("projected", source))


def _two_cores(rates: tuple[float, ...], views: int) -> float:
    """Beyond the views measured, each takes what the last one took."""
    if views <= len(rates):
        return rates[views - 1]
    before, last = (1 / rate for rate in rates[-2:])
    return 1 / (last + (views - len(rates)) * max(0.0, last - before))


def _read(path: Path, config: Config, views: int) -> Feed:
    report = read_report(path, FLAG, COMMAND)
    loaders: Any = report.get("loaders")
    if not isinstance(loaders, dict) or not loaders:
        raise not_such(path, FLAG, COMMAND)
    entries = ENTRIES[config.data.backend]
    name = next((entry for entry in entries if entry in loaders), None)
    if name is None:
        raise ConfigError(f"{FLAG} {path}: measured {', '.join(loaders)}, this run needs {entries[0]}")
    try:
        pixels, workers, counts = report["image_size"], int(report["workers"]), loaders[name]["views"]
        if pixels != config.data.pixels:
            raise _other(path, f"views of {pixels} pixels", str(config.data.pixels))
        if str(views) not in counts:
            known = [count for count in counts if count != "0"]
            raise _other(path, f"{', '.join(known)} views of an image", str(views))
        found = counts[str(views)]
        rate, busy = (statistics.median(found[key]) for key in ("images_per_second", "cores_busy"))
        source = f"{path.name}: {name}, {workers} workers, {report['cpu']}, {report['date'][:10]}"
        return Feed(rate / max(workers, busy), Basis("measured", source))
    except ConfigError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, ZeroDivisionError):
        raise not_such(path, FLAG, COMMAND) from None


def _other(path: Path, measured: str, wanted: str) -> ConfigError:
    return ConfigError(f"{FLAG} {path}: measured with {measured}, this run has {wanted}")
