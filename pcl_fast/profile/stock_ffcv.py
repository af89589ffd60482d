"""FFCV as its documentation uses it: what our loader on FFCV is measured against.

A pipeline for each view: decode with its random resized crop, flip, normalise. FFCV decodes an image once
for each of them.
"""

import functools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pcl_fast.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class StockOptions:
    """What the other loaders are told, too; `mean` and `std` are of pixels scaled to [0, 1]."""

    batch_size: int
    num_views: int
    workers: int
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: tuple[float, float]


class StockFfcvLoader:
    """Batches of a .beton file: a tuple of float32 views [B, 3, S, S] and the labels. On the CPU."""

    def __init__(self, path: Path, options: StockOptions) -> None:
        """Open the file and compile, which takes seconds.

        Raises:
            ConfigError: without FFCV, or for a folder.
        """
        if path.is_dir():
            raise ConfigError(f"{path}: FFCV reads .beton files; `pcl-fast convert imagefolder` makes them")
        _hush_numba()
        threads = torch.get_num_threads()
        try:
            self._loader = _open(path, options)
        except ImportError as error:
            raise ConfigError(f"FFCV cannot be imported ({error}); pip install 'pcl-fast[ffcv]'") from error
        finally:
            torch.set_num_threads(threads)  # FFCV changes it

    def epoch(self, epoch: int) -> Iterator[tuple[Any, ...]]:
        """The batches of an epoch, in an order that FFCV draws."""
        self._loader.next_epoch = epoch
        threads = torch.get_num_threads()
        batches = iter(self._loader)
        try:
            yield from batches
        finally:
            batches.close()
            batches.join()
            torch.set_num_threads(threads)


@functools.cache
def _hush_numba() -> None:
    """Leave out what numba prints when compiled pipelines are collected: a KeyError that harms nothing."""
    told = sys.unraisablehook

    def hook(what: Any) -> None:
        trace = what.exc_traceback
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        place = Path(trace.tb_frame.f_code.co_filename) if trace is not None else Path()
        if what.exc_type is not KeyError or place.parts[-3:] != ("numba", "core", "dispatcher.py"):
            told(what)

    sys.unraisablehook = hook


def _open(path: Path, options: StockOptions) -> Any:
    from ffcv.fields.decoders import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.pipeline.pipeline_spec import PipelineSpec
    from ffcv.transforms import NormalizeImage, RandomHorizontalFlip, ToTensor, ToTorchImage

    mean, std = (255 * np.array(numbers) for numbers in (options.mean, options.std))
    size = (options.image_size, options.image_size)

    def view() -> Any:
        decoder = RandomResizedCropRGBImageDecoder(size, scale=options.scale)
        float32: Any = np.float32  # a type, whatever FFCV's annotation says
        normalise = NormalizeImage(mean, std, float32)
        transforms: list[Any] = [RandomHorizontalFlip(), normalise, ToTensor(), ToTorchImage()]
        return PipelineSpec("image", decoder=decoder, transforms=transforms)

    names = ("image", *(f"view{number}" for number in range(1, options.num_views)))
    return Loader(
        str(path),
        options.batch_size,
        num_workers=options.workers,
        order=OrderOption.RANDOM,
        seed=0,
        pipelines={name: view() for name in names},
    )
