"""The plain-torch views against PIL, torchvision and torch's own antialiased resizing."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.boxes import Boxes, centre_boxes, draw_boxes
from pipelines.normalisation import NORMALISATIONS
from pipelines.resample import reference_views, resample
from pipelines.view_spec import ViewSpec
from tests.pipelines.pictures import (
    GRAY_LEVEL,
    boxes_of,
    by_pil,
    centre_by_torchvision,
    noise,
    padded,
    photos,
    sizes_of,
)

SMALL = [(60, 70), (1, 1), (59, 3), (2, 90), (300, 411), (24, 24)]


def worst(images: list[Tensor], boxes: Boxes[Tensor], size: int) -> float:
    """The greatest difference to PIL, which rounds twice, in gray levels."""
    found = resample(padded(images), boxes, size, torch.float64)
    differences = [
        (found[view, place] - by_pil(image, box, bool(boxes.flip_VB[view, place]), size)).abs().max()
        for view, row in enumerate(boxes.boxes_VB4.tolist())
        for place, (image, box) in enumerate(zip(images, row, strict=True))
    ]
    return float(max(differences))


@pytest.mark.parametrize("size", [24, 65, 224])
def test_random_crops_are_pils_within_a_gray_level(size: int) -> None:
    images = [noise(*shape, 3, seed=number) for number, shape in enumerate(SMALL)]
    boxes = draw_boxes(sizes_of(images), torch.arange(len(images)), 3, 0, 0)
    assert boxes.flip_VB.any()
    assert worst(images, boxes, size) <= GRAY_LEVEL


def test_random_crops_of_photos_are_pils_within_a_gray_level(shared_data: Path) -> None:
    images = photos(shared_data, 70)
    boxes = draw_boxes(sizes_of(images), torch.arange(len(images)), 2, 0, 0)
    # PIL's own coefficients have 22 bits, which moves a value that lies halfway.
    assert worst(images, boxes, 224) <= GRAY_LEVEL + 1e-4


@pytest.mark.parametrize("box", [(5, 6, 1, 1), (0, 0, 40, 1), (39, 0, 1, 50), (0, 0, 40, 50), (7, 3, 24, 24)])
def test_any_box_is_torchs_antialiased_resize(box: tuple[int, int, int, int]) -> None:
    image = noise(40, 50, 3)
    top, left, height, width = box
    crop = image.permute(2, 0, 1)[None, :, top : top + height, left : left + width].double()
    for size in (1, 7, 24, 41):
        expected = F.interpolate(crop, (size, size), mode="bilinear", antialias=True)
        for flip in (False, True):
            found = resample(image[None], boxes_of(box, flip=flip), size, torch.float64)[0]
            torch.testing.assert_close(found, expected.flip(-1) if flip else expected, rtol=0, atol=1e-9)
            single = resample(image[None], boxes_of(box, flip=flip), size)[0]
            torch.testing.assert_close(single.double(), found, rtol=0, atol=1e-4)


def test_a_box_as_large_as_the_view_is_the_pixels() -> None:
    image = noise(40, 50, 3)
    found = resample(image[None], boxes_of((7, 3, 24, 24)), 24)
    assert torch.equal(found[0, 0], image[7:31, 3:27].permute(2, 0, 1).float())


@pytest.mark.parametrize("shape", [(300, 411), (411, 300), (60, 70), (257, 257), (90, 300)], ids=str)
def test_centre_crops_are_torchvisions_within_a_gray_level(shape: tuple[int, int]) -> None:
    image = noise(*shape, 3)
    for size, resize in ((224, 256), (65, 72)):
        found = resample(image[None], centre_boxes(torch.tensor([shape]), size, resize), size, torch.float64)
        assert (found[0, 0] - centre_by_torchvision(image, size, resize)).abs().max() <= GRAY_LEVEL + 1e-4


def test_centre_crops_of_photos_are_torchvisions_within_a_gray_level(shared_data: Path) -> None:
    for image in photos(shared_data, 60):
        found = resample(image[None], centre_boxes(sizes_of([image]), 224, 256), 224, torch.float64)
        assert (found[0, 0] - centre_by_torchvision(image, 224, 256)).abs().max() <= GRAY_LEVEL + 1e-4


def test_views_are_normalised_and_padded() -> None:
    images, boxes = noise(2, 30, 30, 3), boxes_of((0, 0, 30, 30), (3, 4, 20, 10))
    normalisation = NORMALISATIONS["imagenet"]
    raw = resample(images, boxes, 16)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (normalisation.mean, normalisation.std))
    spec = ViewSpec(normalisation=normalisation, size=16, channels=8)
    views = reference_views(images, boxes, spec)
    torch.testing.assert_close(views[:, :, :3], (raw / 255 - mean) / std, rtol=0, atol=1e-5)
    assert not views[:, :, 3:].any()
    assert views.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
