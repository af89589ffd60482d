"""Every loader by its name, over small data of its own kind, for what holds for all of them."""

import dataclasses
import functools
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from pcl_fast.contract import TrainLoader
from pipelines.normalisation import NORMALISATIONS
from pipelines.options import ImageTrainOptions
from pipelines.resident import ResidentTrainLoader, TrainOptions
from pipelines.torch_loader import TorchTrainLoader
from tests.datasets_prep.pictures import convert_folder, write_folder

IMAGES, SIZE, VIEWS = 27, 20, 2
COMMON: dict[str, Any] = {
    "batch_size": 6,
    "num_classes": 3,
    "normalisation": NORMALISATIONS["imagenet"],
    "device": torch.device("cpu"),
    "channels_last": True,
    "num_views": VIEWS,
    "seed": 7,
    "drop_last": False,
}
DECODERS = ("torch", "ffcv", "ffcv, views apart", "dali", "dali's crops")


def write_photos(folder: Path) -> Path:
    """Pictures of two shapes in a .beton file."""
    write_folder(folder / "source", images=IMAGES, width=90, height=64)
    convert_folder(folder / "source", folder / "photos.beton")
    return folder / "photos.beton"


@functools.cache
def open_loader(name: str, path: Path, **changes: Any) -> TrainLoader:
    """A loader of DECODERS for these images, or "resident" with as many of its own.

    Opening compiles, so each is opened once. Skips the test where the library is not installed.
    """
    if name == "resident":
        draws = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (IMAGES, 3, 12, 12), dtype=torch.uint8, generator=draws)
        return ResidentTrainLoader(images, torch.arange(IMAGES) % 3, TrainOptions(**(COMMON | changes)))
    given: dict[str, Any] = {"image_size": SIZE, "workers": 1} | COMMON | changes
    options = ImageTrainOptions(**given)
    if name == "torch":
        return TorchTrainLoader(path, dataclasses.replace(options, workers=0))
    _skip_without("ffcv" if name.startswith("ffcv") else "nvidia.dali")
    if name.startswith("ffcv"):
        from pipelines.ffcv_loader import FfcvTrainLoader

        return FfcvTrainLoader(path, options, "auto" if name == "ffcv" else "device")
    from pipelines.dali_loader import DaliTrainLoader

    crops = "ours" if name == "dali" else "library"
    return DaliTrainLoader(path, dataclasses.replace(options, crops=crops))


def _skip_without(library: str) -> None:
    try:
        found = find_spec(library) is not None
    except ModuleNotFoundError:  # of the package around it
        found = False
    if not found:
        pytest.skip(f"{library} is not installed")
