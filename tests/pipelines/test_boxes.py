"""Boxes against torchvision's, draw by draw and in distribution; numpy, torch and Triton among themselves."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms import RandomResizedCrop

from pcl_fast.errors import ConfigError
from pcl_fast.philox import Stream, philox_numpy
from pipelines.boxes import (
    IMAGENET_CROPS,
    LONGEST_SIDE,
    CropRule,
    centre_boxes,
    centre_boxes_numpy,
    draw_boxes,
    draw_boxes_numpy,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ODD_SIZES = [(1, 1), (20_000, 10), (10, 20_000), (79, 79), (2, 3), (LONGEST_SIDE, LONGEST_SIDE), (1, 500)]
RULES = [
    IMAGENET_CROPS,
    CropRule(scale=(0.5, 0.5), ratio=(1.0, 1.0)),
    CropRule(scale=(0.001, 1.0), ratio=(1 / 8, 8.0)),
]


def some_sizes(count: int) -> Tensor:
    sizes = torch.randint(1, 700, (count, 2), generator=torch.Generator().manual_seed(3))
    sizes[: len(ODD_SIZES)] = torch.tensor(ODD_SIZES)
    return sizes


def some_samples(count: int) -> Tensor:
    return torch.randint(0, 2**31, (count,), generator=torch.Generator().manual_seed(4))


def in_real_numbers(size: tuple[int, int], sample: int, view: int) -> tuple[int, int, int, int]:
    """torchvision's algorithm, of seed 5 and epoch 2, with nothing rounded before the sides are."""
    height, width = size
    for attempt in range(10):
        words = philox_numpy((5, Stream.AUGMENT), 2, sample, view, attempt)
        share, ratio, top, left = (int(word) / 2**32 for word in words)
        area = height * width * (0.08 + (1 - 0.08) * share)
        aspect = math.exp(math.log(3 / 4) + (math.log(4 / 3) - math.log(3 / 4)) * ratio)
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return math.floor(top * (height - h + 1)), math.floor(left * (width - w + 1)), h, w
    return torchvisions_fallback(size)


def torchvisions_fallback(size: tuple[int, int]) -> tuple[int, int, int, int]:
    """The central crop: no attempt at a hundred times the area fits."""
    return RandomResizedCrop.get_params(torch.empty(3, *size), [100.0, 100.0], [3 / 4, 4 / 3])


def kolmogorov_smirnov(one: np.ndarray, other: np.ndarray) -> float:
    """The distance of two empirical distributions, scaled so that one pair in 1000 exceeds 1.95."""
    at = np.concatenate([one, other])
    shares = (np.searchsorted(np.sort(x), at, side="right") / len(x) for x in (one, other))
    distance = np.abs(np.subtract(*shares)).max()
    return float(distance * math.sqrt(len(one) * len(other) / (len(one) + len(other))))


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_numpy_and_torch_agree_bitwise(rule: CropRule) -> None:
    sizes, samples = some_sizes(4000), some_samples(4000)
    for seed in (0, 2**32 - 1):
        ours = draw_boxes(sizes, samples, 3, seed, 7, rule)
        theirs = draw_boxes_numpy(sizes.numpy(), samples.numpy(), 3, seed, 7, rule)
        assert ours.boxes_VB4.dtype == torch.int64
        assert ours.flip_VB.dtype == torch.bool
        np.testing.assert_array_equal(ours.boxes_VB4.numpy(), theirs.boxes_VB4)
        np.testing.assert_array_equal(ours.flip_VB.numpy(), theirs.flip_VB)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_triton_agrees_bitwise(rule: CropRule, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    from pipelines.boxes_triton import draw_boxes_triton

    if DEVICE.type == "cpu":  # interpreted, an operation takes as long for 128 numbers as for 4096
        monkeypatch.setattr("pipelines.boxes_triton.BLOCK", 4096)
    sizes, samples = some_sizes(2500).to(DEVICE), some_samples(2500).to(DEVICE)
    ours = draw_boxes_triton(sizes, samples, 2, 2**32 - 1, 300, rule)
    theirs = draw_boxes(sizes, samples, 2, 2**32 - 1, 300, rule)
    assert torch.equal(ours.boxes_VB4, theirs.boxes_VB4)
    assert torch.equal(ours.flip_VB, theirs.flip_VB)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_boxes_are_inside(rule: CropRule) -> None:
    sizes = some_sizes(4000)
    top, left, height, width = draw_boxes(sizes, some_samples(4000), 3, 1, 0, rule).boxes_VB4.unbind(-1)
    assert torch.stack([height, width]).min() >= 1
    assert torch.stack([top, left]).min() >= 0
    assert (top + height <= sizes[:, 0]).all()
    assert (left + width <= sizes[:, 1]).all()


def test_they_are_torchvisions_for_the_same_draws() -> None:
    sizes, samples = some_sizes(5000), some_samples(5000)
    boxes = draw_boxes(sizes, samples, 2, 5, 2).boxes_VB4
    places = sizes.tolist(), samples.tolist()
    expected = torch.tensor(
        [
            [in_real_numbers((h, w), sample, view) for (h, w), sample in zip(*places, strict=True)]
            for view in range(2)
        ]
    )
    unlike = (boxes != expected).any(-1)
    assert unlike.sum() <= 1
    assert (boxes - expected).abs().max() <= 1


@pytest.mark.parametrize("size", [(20_000, 10), (10, 20_000), (3, 500), (500, 3), (1, 40)], ids=str)
def test_what_no_attempt_fits_gets_torchvisions_central_crop(size: tuple[int, int]) -> None:
    found = draw_boxes(torch.tensor([size] * 20), torch.arange(20), 2, 0, 0).boxes_VB4
    assert (found == torch.tensor(torchvisions_fallback(size))).all()


@pytest.mark.parametrize("size", [(375, 500), (90, 60)], ids=str)
def test_their_distribution_is_torchvisions(size: tuple[int, int]) -> None:
    count, image = 3000, torch.empty(3, *size)
    ours = (
        draw_boxes(torch.tensor([size] * count), torch.arange(count), 1, 0, 0).boxes_VB4[0].double().numpy()
    )
    theirs = np.array(
        [RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(count)], dtype=float
    )
    for statistic in (
        lambda b: b[:, 2] * b[:, 3],
        lambda b: np.log(b[:, 3] / b[:, 2]),
        lambda b: b[:, 0] + b[:, 2] / 2,
        lambda b: b[:, 1] + b[:, 3] / 2,
        lambda b: b[:, 0] / np.maximum(size[0] - b[:, 2], 1),
        lambda b: b[:, 1] / np.maximum(size[1] - b[:, 3], 1),
    ):
        one, other = statistic(ours), statistic(theirs)
        assert kolmogorov_smirnov(one, other) < 1.95
        error = math.sqrt((one.var() + other.var()) / count)
        assert abs(one.mean() - other.mean()) < 4 * error


def test_flips_are_even_and_independent_of_the_boxes() -> None:
    boxes = draw_boxes(torch.tensor([[375, 500]] * 20_000), torch.arange(20_000), 2, 0, 0)
    flips = boxes.flip_VB.double()
    assert abs(flips.mean() - 0.5) < 5 * 0.5 / math.sqrt(40_000)
    for side in boxes.boxes_VB4.double().unbind(-1):
        assert abs(torch.corrcoef(torch.stack([flips.flatten(), side.flatten()]))[0, 1]) < 5 / math.sqrt(
            40_000
        )
    assert abs(torch.corrcoef(flips)[0, 1]) < 5 / math.sqrt(20_000)


def test_a_box_depends_on_seed_epoch_sample_and_view_alone() -> None:
    sizes, samples = some_sizes(50), some_samples(50)
    together = draw_boxes(sizes, samples, 3, 9, 4).boxes_VB4
    alone = draw_boxes(sizes[13:14], samples[13:14], 2, 9, torch.tensor(4)).boxes_VB4
    assert torch.equal(alone, together[:2, 13:14])
    sizes[:] = 400
    first = draw_boxes(sizes, samples, 2, 9, 4).boxes_VB4
    for other in (
        first[[1, 0]],
        draw_boxes(sizes, samples, 2, 8, 4).boxes_VB4,
        draw_boxes(sizes, samples, 2, 9, 5).boxes_VB4,
        draw_boxes(sizes, samples + 1, 2, 9, 4).boxes_VB4,
    ):
        assert (other == first).all(-1).double().mean() < 0.05


@pytest.mark.parametrize("size", [224, 256])
def test_centre_boxes_are_torchvisions(size: int) -> None:
    sizes = some_sizes(500)
    found = centre_boxes(sizes, size, 256)
    grids_VB4 = found.grids_VB4
    assert grids_VB4 is not None
    assert torch.equal(found.boxes_VB4[0], torch.cat([torch.zeros_like(sizes), sizes], 1))
    assert not found.flip_VB.any()
    for (height, width), grid in zip(sizes.tolist(), grids_VB4[0].tolist(), strict=True):
        # torchvision's `_compute_resized_output_size` and `center_crop`.
        short, long = sorted((height, width))
        rows, columns = (256, int(256 * long / short)) if height <= width else (int(256 * long / short), 256)
        assert grid == [rows, columns, round((rows - size) / 2.0), round((columns - size) / 2.0)]
    in_numpy = centre_boxes_numpy(sizes.numpy(), size, 256)
    for ours, theirs in zip(
        (found.boxes_VB4, found.flip_VB, grids_VB4),
        (in_numpy.boxes_VB4, in_numpy.flip_VB, in_numpy.grids_VB4),
        strict=True,
    ):
        np.testing.assert_array_equal(ours.numpy(), theirs)


@pytest.mark.parametrize("scale", [(0.0, 1.0), (0.5, 0.4), (0.5, 1.1)], ids=str)
def test_shares_that_are_none(scale: tuple[float, float]) -> None:
    with pytest.raises(ConfigError, match="rising shares"):
        CropRule(scale=scale)


@pytest.mark.parametrize("ratio", [(0.0, 1.0), (2.0, 1.0), (0.1, 1.0), (1.0, 9.0)], ids=str)
def test_ratios_that_are_none(ratio: tuple[float, float]) -> None:
    with pytest.raises(ConfigError, match="1/8 to 8"):
        CropRule(ratio=ratio)
