"""Pictures of every kind that decoders may take differently, and DALI's batches of them."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from pcl_fast.contract import TrainLoader, ViewBatch
from pipelines.dali_loader import DaliTrainLoader
from pipelines.normalisation import NORMALISATIONS
from pipelines.options import ImageEvalOptions, ImageTrainOptions
from tests.datasets_prep.pictures import encoded, picture, write_folder

IMAGES, SIZE, VIEWS = 27, 20, 2
NORMALISATION = NORMALISATIONS["imagenet"]
MEAN, STD = (torch.tensor(part).view(3, 1, 1) for part in (NORMALISATION.mean, NORMALISATION.std))
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


def odd_kinds() -> dict[str, bytes]:
    """Images that decoders may take differently."""
    turned = Image.Exif()
    turned[0x0112] = 6
    plain = encoded(picture(97))
    return {
        "gray.jpg": encoded(picture(90).convert("L")),
        "cmyk.jpg": encoded(picture(91).convert("CMYK")),
        "png.jpg": encoded(picture(92), "PNG"),
        "palette.png": encoded(picture(93).convert("P"), "PNG"),
        "alpha.png": encoded(picture(94).convert("RGBA"), "PNG"),
        "progressive.jpg": encoded(picture(95), progressive=True),
        "turned.jpg": encoded(picture(96), exif=turned),
        "stray.jpg": plain[:20] + b"stray" + plain[20:],
        "followed.jpg": plain + b"something else",
        "restarts.jpg": encoded(picture(98), restart_marker_blocks=2),
        "fine.jpg": encoded(picture(99), subsampling=0),
        "tiny.jpg": encoded(picture(89, width=1, height=1)),
    }


def write_photos(path: Path) -> Path:
    """Pictures of many shapes in three classes, the last of them odd kinds."""
    odd = odd_kinds()
    write_folder(path, images=IMAGES - len(odd), width=90, height=64)
    for number in range(0, IMAGES - len(odd), 3):
        tall = picture(number, width=30 + number, height=70)
        (path / f"c{number % 3}" / f"{number:04}.jpg").write_bytes(encoded(tall))
    for name, data in odd.items():
        (path / "c2" / name).write_bytes(data)
    return path


def batches_of(path: Path, epoch: int = 1, first_step: int = 0, **changes: Any) -> list[ViewBatch]:
    loader: TrainLoader = DaliTrainLoader(path, dataclasses.replace(TRAIN, **changes))
    return list(loader.epoch(epoch, first_step))
