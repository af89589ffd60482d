"""Images to make views of, and the views that PIL makes of them."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as tv

from pipelines.boxes import Boxes
from pipelines.normalisation import Normalisation
from pipelines.view_spec import ViewSpec

# What leaves pixels from 0 to 255 as they are.
IDENTITY = Normalisation((0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255))
GRAY_LEVEL = 1.0


def plain(size: int, **options: Any) -> ViewSpec:
    """Views that are not normalised."""
    return ViewSpec(normalisation=IDENTITY, size=size, **options)


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Uint8 noise: the worst case of a filter."""
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def photos(shared_data: Path, step: int) -> list[Tensor]:
    """Every `step`-th photo, uint8 `[H, W, 3]`."""
    paths = sorted((shared_data / "imagenet-mini" / "train").glob("*/*.JPEG"))[::step]
    assert paths
    return [torch.from_numpy(np.array(Image.open(path).convert("RGB"))) for path in paths]


def sizes_of(images: list[Tensor]) -> Tensor:
    """`[B, 2]`: heights and widths."""
    return torch.tensor([image.shape[:2] for image in images])


def padded(images: list[Tensor]) -> Tensor:
    """Images in the upper left of one uint8 batch, beside them what no view may see."""
    height, width = sizes_of(images).amax(0).tolist()
    batch = noise(len(images), height, width, 3, seed=9)
    for place, image in zip(batch, images, strict=True):
        place[: image.shape[0], : image.shape[1]] = image
    return batch


def boxes_of(*boxes: tuple[int, int, int, int], flip: bool = False) -> Boxes[Tensor]:
    """One view an image."""
    return Boxes(torch.tensor([boxes]), torch.full((1, len(boxes)), flip))


def by_pil(image: Tensor, box: list[int], flip: bool, size: int) -> Tensor:
    """Cropped, resized and flipped by PIL: float64 `[3, size, size]`, whole numbers."""
    top, left, height, width = box
    picture: Any = Image.fromarray(image.numpy()).crop((left, top, left + width, top + height))
    picture = picture.resize((size, size), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(tv.hflip(picture) if flip else picture)).permute(2, 0, 1).double()


def centre_by_torchvision(image: Tensor, size: int, resize: int) -> Tensor:
    """Resized and cropped by torchvision, on PIL images: float64 `[3, size, size]`, whole numbers."""
    picture: Any = Image.fromarray(image.numpy())
    picture = tv.center_crop(tv.resize(picture, [resize]), [size])
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).double()
