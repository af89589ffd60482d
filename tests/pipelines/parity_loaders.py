"""Every loader of .beton files, and a way to see the pixels that it decodes."""

import dataclasses
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pcl_fast.contract import EvalLoader, TrainLoader
from pipelines.options import ImageEvalOptions
from pipelines.torch_loader import TorchEvalLoader, TorchTrainLoader, decode
from tests.pipelines.parity import EPOCH, OURS, Limits, Options, Pixels, Views, in_gray_levels

# DALI repeats the pixels of a box's rim where the filter reaches beyond; 13 levels were seen.
DALIS = Limits(resampling=20, inside=1.02)
# Its weights have 16 bits: where PIL rounds down it may round up, twice. That was one value of 9 million.
TORCHVISIONS = Limits(resampling=2.02, inside=2.02)
TORCHS = "PIL and torchvision"
OTHER_WAYS = ("FFCV, views by device", "DALI, its crops")  # of loaders that are there twice
HAS_FFCV = find_spec("ffcv") is not None
HAS_DALI = find_spec("nvidia") is not None and find_spec("nvidia.dali") is not None
MISSING = tuple(
    f"pip install 'pcl-fast[{extra}]'" for extra, here in (("ffcv", HAS_FFCV), ("dali", HAS_DALI)) if not here
)


@dataclasses.dataclass(frozen=True)
class LoaderPath:
    """A loader, made by `open(path, options)`; `watch` keeps what it decodes until patches are undone."""

    open: Callable[[Path, Any], Any]
    watch: Callable[[pytest.MonkeyPatch, Pixels], None]
    limits: Limits


def views_by_loader(loader: Any, options: Options) -> Views:
    """One epoch, or all that is evaluated."""
    found: Views = {}
    if isinstance(options, ImageEvalOptions):
        evaluation: EvalLoader = loader
        for batch in evaluation:
            found |= {len(found) + place: image[None] for place, image in enumerate(batch.images_BCHW)}
    else:
        training: TrainLoader = loader
        for batch in training.epoch(EPOCH):
            ids = batch.sample_ids_B.tolist()
            found |= {sample: batch.views_VBCHW[:, place] for place, sample in enumerate(ids)}
    return {sample: in_gray_levels(views, options) for sample, views in found.items()}


def open_ffcv(path: Path, options: Options) -> Any:
    """Views are made by the threads that decode."""
    from pipelines.ffcv_loader import FfcvEvalLoader, FfcvTrainLoader

    if isinstance(options, ImageEvalOptions):
        return FfcvEvalLoader(path, options, "decoder")
    return FfcvTrainLoader(path, options, "decoder")


def open_ffcv_device(path: Path, options: Options) -> Any:
    """Views are left to the device, which may be the CPU."""
    from pipelines.ffcv_loader import FfcvEvalLoader, FfcvTrainLoader

    if isinstance(options, ImageEvalOptions):
        return FfcvEvalLoader(path, options, "device")
    return FfcvTrainLoader(path, options, "device")


def watch_ffcv(patch: pytest.MonkeyPatch, seen: Pixels) -> None:
    """Have images decoded to memory that stays; views are made from there."""
    from pipelines.ffcv_kernel import OUT, STRIDE
    from pipelines.ffcv_work import ViewsWhenDecoded

    begin, end = ViewsWhenDecoded.begin, ViewsWhenDecoded.end
    kept: list[torch.Tensor] = []

    def begin_watched(work: ViewsWhenDecoded, ids_B: Any, table: Any) -> Any:
        begun = begin(work, ids_B, table)
        kept[:] = [torch.zeros(*size, 3, dtype=torch.uint8) for size in work.samples.file.sizes_N2[ids_B]]
        table[:, OUT] = [image.data_ptr() for image in kept]
        table[:, STRIDE] = [image.stride(0) for image in kept]
        return begun

    def end_watched(work: ViewsWhenDecoded, ids_B: Any, table: Any, begun: Any) -> Any:
        seen.update(zip(ids_B.tolist(), kept, strict=True))
        return end(work, ids_B, table, begun)

    patch.setattr(ViewsWhenDecoded, "begin", begin_watched)
    patch.setattr(ViewsWhenDecoded, "end", end_watched)


def watch_ffcv_device(patch: pytest.MonkeyPatch, seen: Pixels) -> None:
    """Keep the images that views are about to be made of."""
    from pipelines.ffcv_work import Decoded, ViewsOnTheDevice

    serve = ViewsOnTheDevice.serve

    def serve_watched(work: ViewsOnTheDevice, made: Decoded) -> Any:
        for place, (height, width) in enumerate(made.sizes_B2.tolist()):
            seen[int(made.ids_B[place])] = made.images_BHWC[place, :height, :width].clone()
        return serve(work, made)

    patch.setattr(ViewsOnTheDevice, "serve", serve_watched)


def open_dali(path: Path, options: Options) -> Any:
    """Crops are resized by our kernels."""
    from pipelines.dali_loader import DaliEvalLoader, DaliTrainLoader

    return (DaliEvalLoader if isinstance(options, ImageEvalOptions) else DaliTrainLoader)(path, options)  # type: ignore[arg-type]


def open_dali_crops(path: Path, options: Options) -> Any:
    """Crops are resized by DALI."""
    return open_dali(path, dataclasses.replace(options, crops="library"))


def watch_dali(patch: pytest.MonkeyPatch, seen: Pixels) -> None:
    """Keep what comes out of DALI's decoder."""
    from pipelines.dali_work import _Run

    check = _Run._check_sizes

    def check_watched(run: Any, batch: Any, outputs: Any) -> None:
        decoded = outputs[0 if run.work.plan.crops is None else -1]
        for sample, image in zip(batch.ids_B.tolist(), decoded, strict=True):
            seen[sample] = torch.from_dlpack(image).clone()
        check(run, batch, outputs)

    patch.setattr(_Run, "_check_sizes", check_watched)


def open_torch(path: Path, options: Options) -> Any:
    """Decoded by PIL and resized by torchvision, in this process."""
    options = dataclasses.replace(options, workers=0)
    return (
        TorchEvalLoader(path, options)
        if isinstance(options, ImageEvalOptions)
        else TorchTrainLoader(path, options)
    )


def watch_torch(patch: pytest.MonkeyPatch, seen: Pixels) -> None:
    """Keep what PIL decodes."""

    def decode_watched(source: Any, sample: int) -> Image.Image:
        image = decode(source, sample)
        seen[sample] = torch.from_numpy(np.array(image))
        return image

    patch.setattr("pipelines.torch_loader.decode", decode_watched)


def _paths() -> dict[str, LoaderPath]:
    found: dict[str, LoaderPath] = {}
    if HAS_FFCV:
        found["FFCV, views by threads"] = LoaderPath(open_ffcv, watch_ffcv, OURS)
        found["FFCV, views by device"] = LoaderPath(open_ffcv_device, watch_ffcv_device, OURS)
    if HAS_DALI:
        found["DALI, our crops"] = LoaderPath(open_dali, watch_dali, OURS)
        found["DALI, its crops"] = LoaderPath(open_dali_crops, watch_dali, DALIS)
    return found | {TORCHS: LoaderPath(open_torch, watch_torch, TORCHVISIONS)}


LOADER_PATHS = _paths()
