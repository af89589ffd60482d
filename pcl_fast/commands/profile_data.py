"""`pcl-fast profile data FILE`: the speed of the loaders alone, for several numbers of views."""

import importlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console
from rich.table import Table

from pcl_fast import atomic
from pcl_fast.commands.profile import machine
from pcl_fast.errors import ConfigError, DataError, PclError, did_you_mean
from pcl_fast.profile.loading import DECODE_ALONE, Contender, Loader, Window, interleave, shares, verdict
from pcl_fast.profile.stock_ffcv import StockFfcvLoader, StockOptions
from pipelines.images import list_classes, open_images
from pipelines.normalisation import NORMALISATIONS
from pipelines.options import ImageTrainOptions

LOADERS = {
    "ffcv": ("pipelines.ffcv_loader", "FfcvTrainLoader"),
    "dali": ("pipelines.dali_loader", "DaliTrainLoader"),
    "torch": ("pipelines.torch_loader", "TorchTrainLoader"),
}
STOCK = "stock-ffcv"
BATCH_SIZES = (64, 32, 16, 8, 4, 2, 1)
# Crops of so small a share of an image, resized to so little, cost nothing beside its decoding.
TINY_SCALE, TINY_SIZE = (1e-4, 1e-4), 8
Found = dict[str, dict[int, Contender]]


@dataclass(frozen=True, kw_only=True)
class DataArguments:
    """Measure how many images a second loaders decode and augment, in turn, on the same images."""

    file: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FILE")]
    """A .beton file, or (dali and torch) a folder with a subfolder of images for each class"""
    backends: str = "ffcv,dali,torch"
    """Which, with commas between: ffcv, dali, torch, stock-ffcv (FFCV as it comes: it decodes once a view)"""
    views: str = "1,2,3"
    """Numbers of views, with commas between"""
    workers: int = 0
    """Threads or processes of each; 0: one for each core"""
    batches: int = 24
    """Batches that are timed in each run; fewer where the images do not suffice"""
    repeats: int = 3
    """Runs of each"""
    image_size: int = 224
    """Side of the views, in pixels"""
    device: str = "cpu"
    """Where the views are wanted: cpu or cuda"""
    json: Path | None = None
    """Write everything measured to this file, too"""

    def __post_init__(self) -> None:
        """Validate."""
        for name, least in (("workers", 0), ("batches", 1), ("repeats", 1), ("image_size", 1)):
            if getattr(self, name) < least:
                flag = name.replace("_", "-")
                raise ConfigError(f"--{flag} {getattr(self, name)}: give at least {least}")
        for name in self.backend_names:
            if name not in (*LOADERS, STOCK):
                hint = did_you_mean(name, (*LOADERS, STOCK)) or f" There are: {', '.join((*LOADERS, STOCK))}."
                raise ConfigError(f"--backends {name}: no such loader.{hint}")
        if not all(word.isdecimal() and int(word) >= 1 for word in self.views.split(",")):
            raise ConfigError(f"--views {self.views}: give numbers from 1 on with commas between, as 1,2,3")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("--device cuda: torch finds no CUDA device here")
        if self.device not in ("cpu", "cuda"):
            raise ConfigError(f"--device {self.device}: give cpu or cuda")

    @property
    def backend_names(self) -> list[str]:
        """Each once, in the order given."""
        return list(dict.fromkeys(self.backends.split(",")))

    @property
    def view_counts(self) -> list[int]:
        """Each once, rising."""
        return sorted({int(word) for word in self.views.split(",")})

    @property
    def threads(self) -> int:
        """Of each loader."""
        return self.workers or _cores()


def main(words: Sequence[str]) -> None:
    """Measure, print a table with a verdict on each loader, and write the JSON that was asked for."""
    arguments = tyro.cli(DataArguments, args=words, prog="pcl-fast profile data")
    console = Console()
    window = fit_window(arguments, len(open_images(arguments.file.expanduser()).labels_N))
    found, left_out = measure(arguments, window, console.print)
    console.print(results_table(arguments, window, found))
    for name, contenders in found.items():
        console.print(f"{name}: {verdict(contenders, _cores())}", highlight=False)
    for name, reason in left_out.items():
        console.print(f"{name} was left out: {reason}", highlight=False, markup=False)
    console.print(", ".join(f"{key} {value}" for key, value in machine().items()), highlight=False)
    if arguments.json is not None:
        report = _report(arguments, window, found, left_out)
        atomic.write_text(arguments.json.expanduser(), json.dumps(report, indent=2) + "\n")


def fit_window(arguments: DataArguments, num_images: int) -> Window:
    """The largest batches of which there are enough; DataError if the images do not suffice."""
    lead = 2 * arguments.threads + 2
    for wanted in (arguments.batches, 1):
        for batch_size in BATCH_SIZES:
            batches = min(arguments.batches, num_images // batch_size - 2 * lead)
            if batches >= wanted:
                return Window(batch_size, lead, batches)
    raise DataError(
        f"{arguments.file}: {num_images} images are too few to measure {arguments.threads} workers; "
        f"give a larger file, or --workers {max(1, (num_images - 5) // 4)}"
    )


def measure(
    arguments: DataArguments, window: Window, say: Callable[[str], None]
) -> tuple[Found, dict[str, str]]:
    """The contenders of each backend by their views, and why others were left out."""
    found: Found = {}
    left_out: dict[str, str] = {}
    device = torch.device(arguments.device)
    for name in arguments.backend_names:
        contenders = {
            views: Contender(
                views,
                partial(open_loader, arguments, window, name, views),
                decodes=max(views, 1) if name == STOCK else 1,
            )
            for views in (DECODE_ALONE, *arguments.view_counts)
        }
        try:
            seconds = sum(contender.start(window, device).warmup for contender in contenders.values())
        except PclError as error:
            left_out[name] = str(error)
            if len(left_out) == len(arguments.backend_names):
                raise
            continue
        say(f"{name}: started in {seconds:.1f} s")
        found[name] = contenders
    every = [contender for contenders in found.values() for contender in contenders.values()]
    interleave(every, arguments.repeats, window, device)
    return found, left_out


def open_loader(arguments: DataArguments, window: Window, name: str, views: int) -> Loader:
    """A loader of `views` views, or, for DECODE_ALONE, of next to nothing of each image."""
    alone, path = views == DECODE_ALONE, arguments.file.expanduser()
    size, scale = (TINY_SIZE, TINY_SCALE) if alone else (arguments.image_size, (0.08, 1.0))
    normalisation = NORMALISATIONS["imagenet"]
    if name == STOCK:
        options = StockOptions(
            batch_size=window.batch_size,
            num_views=max(views, 1),
            workers=arguments.threads,
            image_size=size,
            mean=normalisation.mean,
            std=normalisation.std,
            scale=scale,
        )
        return StockFfcvLoader(path, options)
    module, loader = LOADERS[name]
    try:
        make = getattr(importlib.import_module(module), loader)
        return make(path, _options(arguments, window, views, size, scale))
    except ImportError as error:
        raise ConfigError(f"it cannot be imported ({error}); pip install 'pcl-fast[{name}]'") from error


def results_table(arguments: DataArguments, window: Window, found: Found) -> Table:
    """A row for each loader and number of views."""
    title = f"{arguments.file}: loaders alone, {arguments.threads} workers"
    table = Table(title=title, title_justify="left", caption_justify="left")
    for column in ("loader", "views"):
        table.add_column(column, no_wrap=True)
    for column in ("images/s", "low - high", "views/s", "cores", "MB", "start, s"):
        table.add_column(column, justify="right", no_wrap=True)
    table.caption = (
        f"{window.batches} batches of {window.batch_size}, {arguments.repeats} times in turn, medians; start: "
        "opening, compiling, first batches, not counted; MB: what that took, the libraries once"
    )
    for name, contenders in found.items():
        for views, contender in contenders.items():
            assert contender.cold is not None
            rates = [sample.images for sample in contender.samples]
            table.add_row(
                name,
                "decode only" if views == DECODE_ALONE else str(views),
                f"{contender.images:,.0f}",
                f"{min(rates):,.0f} - {max(rates):,.0f}",
                "" if views == DECODE_ALONE else f"{views * contender.images:,.0f}",
                f"{contender.cores:.1f}",
                f"{contender.cold.memory / 1e6:,.0f}",
                f"{contender.cold.warmup:.1f}",
            )
        table.add_section()
    return table


def _options(
    arguments: DataArguments, window: Window, views: int, size: int, scale: tuple[float, float]
) -> ImageTrainOptions:
    return ImageTrainOptions(
        batch_size=window.batch_size,
        num_classes=list_classes(arguments.file.expanduser()).number,
        normalisation=NORMALISATIONS["imagenet"],
        device=torch.device(arguments.device),
        channels_last=True,
        image_size=size,
        workers=arguments.threads,
        num_views=max(views, 1),
        seed=0,
        scale=scale,
    )


def _report(
    arguments: DataArguments, window: Window, found: Found, left_out: dict[str, str]
) -> dict[str, Any]:
    """Everything measured."""
    loaders = {
        name: {
            "views": {str(views): _figures(contender) for views, contender in contenders.items()},
            "shares": asdict(shares(contenders)),
            "verdict": verdict(contenders, _cores()),
        }
        for name, contenders in found.items()
    }
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **machine(),
        "file": str(arguments.file),
        "workers": arguments.threads,
        "device": arguments.device,
        "image_size": arguments.image_size,
        "window": asdict(window),
        "loaders": loaders,
        "left_out": left_out,
    }


def _figures(contender: Contender) -> dict[str, Any]:
    assert contender.cold is not None
    return {
        "images_per_second": [sample.images for sample in contender.samples],
        "cores_busy": [sample.cores for sample in contender.samples],
        "memory_bytes": contender.cold.memory,
        "warmup_seconds": contender.cold.warmup,
    }


def _cores() -> int:
    return len(os.sched_getaffinity(0))
