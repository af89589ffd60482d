"""`pcl-fast profile data FILE`: the speed of the loaders alone, for several numbers of views."""

import importlib
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from rich.console import Console

from pcl_fast import atomic
from pcl_fast.commands.flags import read_flags
from pcl_fast.commands.profile.data_arguments import HOST, LOADERS, STOCK, DataArguments
from pcl_fast.commands.profile.data_report import Found, report_of, results_table
from pcl_fast.commands.profile.preset import machine
from pcl_fast.errors import ConfigError, DataError, PclError
from pcl_fast.profile.loading import (
    DECODE_ALONE,
    Contender,
    Loader,
    Window,
    interleave,
)
from pcl_fast.profile.stock_ffcv import StockFfcvLoader, StockOptions
from pcl_fast.profile.usage import cores_available
from pcl_fast.profile.verdict import verdict
from pipelines.images import list_classes, open_images
from pipelines.normalisation import NORMALISATIONS
from pipelines.options import ImageTrainOptions

BATCH_SIZES = (64, 32, 16, 8, 4, 2, 1)
# Crops of so small a share of an image, resized to so little, cost nothing beside its decoding.
TINY_SCALE, TINY_SIZE = (1e-4, 1e-4), 8


def main(words: Sequence[str]) -> None:
    """Measure, print a table with a verdict on each loader, and write the JSON that was asked for."""
    arguments = read_flags(DataArguments, words, "pcl-fast profile data")
    arguments.check()
    console = Console()
    window = fit_window(arguments, len(open_images(arguments.file.expanduser()).labels_N))
    found, left_out = measure(arguments, window, console.print)
    console.print(results_table(arguments, window, found))
    for name, contenders in found.items():
        console.print(f"{name}: {verdict(contenders, cores_available())}", highlight=False)
    for name, reason in left_out.items():
        console.print(f"{name} was left out: {reason}", highlight=False, markup=False)
    console.print(", ".join(f"{key} {value}" for key, value in machine().items()), highlight=False)
    if arguments.json is not None:
        report = report_of(arguments, window, found, left_out)
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
    module, loader = LOADERS["ffcv" if name == HOST else name]
    asked = _options(arguments, window, views, size, scale)
    try:
        make = getattr(importlib.import_module(module), loader)
        return _HostPart(make(path, asked, make_views="device")) if name == HOST else make(path, asked)
    except ImportError as error:
        extra = name.removesuffix("-host")
        raise ConfigError(f"it cannot be imported ({error}); pip install 'pcl-fast[{extra}]'") from error


class _HostPart:
    """The host's part of a loader whose views are left to the device."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def epoch(self, epoch: int) -> Iterator[Any]:
        """The batches as they are sent."""
        return self.loader.host_part(epoch)


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
