"""Pictures in a .beton file, and FFCV's loaders of it; importing this without FFCV skips the test."""

import dataclasses
import functools
import hashlib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from pcl_fast.contract import EvalLoader, TrainLoader, ViewBatch
from pipelines.normalisation import NORMALISATIONS
from pipelines.options import ImageEvalOptions, ImageTrainOptions
from tests.datasets_prep.pictures import convert_folder, encoded, picture, write_folder

if find_spec("ffcv") is None:
    pytest.skip("ffcv is not installed: pip install 'pcl-fast[ffcv]'", allow_module_level=True)

from pipelines.ffcv_loader import FfcvEvalLoader, FfcvTrainLoader

IMAGES, SIZE, VIEWS = 27, 20, 2
NORMALISATION = NORMALISATIONS["imagenet"]
LEVEL = 1 / 255 / min(NORMALISATION.std)
COMMON: dict[str, Any] = {
    "num_classes": 3,
    "normalisation": NORMALISATION,
    "device": torch.device("cpu"),
    "channels_last": True,
    "image_size": SIZE,
    "workers": 2,
}
TRAIN = ImageTrainOptions(batch_size=6, num_views=VIEWS, seed=7, drop_last=False, **COMMON)
EVAL = ImageEvalOptions(batch_size=6, resize=24, **COMMON)


def write_photos(folder: Path) -> Path:
    """Pictures of many shapes and kinds of JPEG in three classes."""
    write_folder(folder, images=IMAGES - 6, width=90, height=64)
    for number in range(0, IMAGES - 6, 3):
        tall = picture(number, width=31 + number, height=71)
        (folder / f"c{number % 3}" / f"{number:04}.jpg").write_bytes(encoded(tall))
    odd = [
        encoded(picture(90).convert("L")),
        encoded(picture(91, 77, 55), progressive=True),
        encoded(picture(92, 77, 55), subsampling=0),
        encoded(picture(93, 77, 55), subsampling=1, restart_marker_blocks=2),
        encoded(picture(94, 1, 1)),
        encoded(picture(95, 199, 2)),
    ]
    for number, data in enumerate(odd):
        (folder / "c2" / f"{9000 + number}.jpg").write_bytes(data)
    return folder


def convert_photos(folder: Path) -> Path:
    convert_folder(write_photos(folder / "source"), folder / "photos.beton")
    return folder / "photos.beton"


@functools.cache
def opened(path: Path, options: ImageTrainOptions, how: Any) -> TrainLoader:
    """Opening compiles; a loader may be used again and again."""
    return FfcvTrainLoader(path, options, how)


@functools.cache
def opened_to_evaluate(path: Path, options: ImageEvalOptions = EVAL) -> EvalLoader:
    return FfcvEvalLoader(path, options)


def batches_of(path: Path, epoch: int = 1, first_step: int = 0, **changes: Any) -> list[ViewBatch]:
    how = changes.pop("make_views", "auto")
    loader = opened(path, dataclasses.replace(TRAIN, **changes), how)
    return list(loader.epoch(epoch, first_step))


def digest(batches: list[ViewBatch]) -> str:
    found = hashlib.sha256()
    for batch in batches:
        for tensor in (batch.views_VBCHW, batch.labels_B, batch.sample_ids_B):
            found.update(tensor.contiguous().numpy().tobytes())
    return found.hexdigest()
