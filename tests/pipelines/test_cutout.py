"""Squares cut out of the views of any loader: where, how large, and from what they are drawn."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from pcl_fast.contract import DeviceLoader, TrainLoader, ViewBatch
from pcl_fast.errors import ConfigError
from pcl_fast.step.obstacles import find_obstacle
from pipelines.cutout import draw_holes, with_cutout
from pipelines.normalisation import NORMALISATIONS
from pipelines.resident import ResidentTrainLoader, TrainOptions
from pipelines.synthetic import SyntheticOptions, SyntheticTrainLoader

CPU = torch.device("cpu")
IMAGES, SIDE, HOLE, SEED = 43, 12, 5, 7


def resident(**changes: Any) -> ResidentTrainLoader:
    usual: dict[str, Any] = {
        "batch_size": 8,
        "num_classes": 10,
        "normalisation": NORMALISATIONS["cifar10"],
        "device": CPU,
        "channels_last": False,
        "num_views": 3,
        "seed": SEED,
        "drop_last": False,
    }
    draws = torch.Generator().manual_seed(0)
    images = torch.randint(1, 256, (IMAGES, 3, SIDE, SIDE), dtype=torch.uint8, generator=draws)
    return ResidentTrainLoader(images, torch.arange(IMAGES) % 10, TrainOptions(**(usual | changes)))


def cut(loader: TrainLoader, seed: int = SEED) -> TrainLoader:
    return with_cutout(loader, HOLE, seed, CPU)


def by_sample(batches: Iterator[ViewBatch]) -> dict[int, Tensor]:
    return {
        sample: batch.views_VBCHW[:, place]
        for batch in batches
        for place, sample in enumerate(batch.sample_ids_B.tolist())
    }


def squares(centre: int, size: int, extent: int) -> list[int]:
    first = centre - size // 2
    return [place for place in range(first, first + size) if 0 <= place < extent]


@pytest.mark.parametrize(("size", "height", "width"), [(5, 12, 9), (4, 12, 9), (1, 6, 7), (9, 9, 9)])
def test_holes_are_squares_around_uniform_centres_clipped_at_the_border(
    size: int, height: int, width: int
) -> None:
    """Every hole is that of one centre, and all centres are equally likely (chi-squared, five sigma)."""
    holes = draw_holes(torch.arange(3000), (2, height, width), size, SEED, 1).flatten(0, 1)
    assert torch.equal(holes, holes.any(2, keepdim=True) & holes.any(1, keepdim=True)), "rectangles"
    for extent, of_axis in ((height, holes.any(2)), (width, holes.any(1))):
        expected = torch.zeros(extent, extent, dtype=torch.bool)
        for centre in range(extent):
            expected[centre, squares(centre, size, extent)] = True
        counts, kinds = torch.zeros(extent), expected.unique(dim=0)
        for kind in kinds:
            counts[int((expected == kind).all(1).nonzero()[0])] = (of_axis == kind).all(1).sum()
        assert counts.sum() == len(holes), "some are of no centre"
        share = torch.stack([(expected == expected[c]).all(1).sum() for c in range(extent)]) / extent
        kept = counts > 0
        assert int(kept.sum()) == len(kinds)
        chi = ((counts - share * len(holes))[kept] ** 2 / (share * len(holes))[kept]).sum()
        freedom = max(len(kinds) - 1, 1)
        assert chi < freedom + 5 * (2 * freedom) ** 0.5 + 5


def test_the_mean_area_is_that_of_all_centres() -> None:
    holes = draw_holes(torch.arange(20_000), (1, 32, 32), 16, SEED, 0)
    side = sum(len(squares(centre, 16, 32)) for centre in range(32)) / 32
    areas = holes.flatten(2).sum(-1).double()
    assert abs(areas.mean() - side**2) < 5 * areas.std() / len(areas[0]) ** 0.5
    assert holes.double().mean((0, 1)).min() > 0.05, "no pixel is spared"


def test_views_samples_epochs_and_seeds_have_holes_of_their_own() -> None:
    ids = torch.arange(4000)
    usual = draw_holes(ids, (2, 32, 32), 16, SEED, 3)
    others = {
        "view": usual[1],
        "sample": usual[0].roll(1, 0),
        "epoch": draw_holes(ids, (1, 32, 32), 16, SEED, 4)[0],
        "seed": draw_holes(ids, (1, 32, 32), 16, SEED + 1, 3)[0],
    }
    for name, other in others.items():
        columns = torch.stack([usual[0, :, :, 16].sum(1), other[:, :, 16].sum(1)]).double()
        rows = torch.stack([usual[0].any(2).int().argmax(1), other.any(2).int().argmax(1)]).double()
        for pairs in (columns, rows):
            assert abs(torch.corrcoef(pairs)[0, 1]) < 5 / len(ids) ** 0.5, name


@pytest.mark.parametrize("channels_last", [False, True])
def test_pixels_are_zero_in_the_hole_and_the_loaders_elsewhere(channels_last: bool) -> None:
    plain = next(iter(resident(channels_last=channels_last).epoch(2)))
    found = next(iter(cut(resident(channels_last=channels_last)).epoch(2)))
    holes = draw_holes(plain.sample_ids_B, (3, SIDE, SIDE), HOLE, SEED, 2).unsqueeze(2)
    assert torch.equal(found.views_VBCHW, plain.views_VBCHW.masked_fill(holes, 0.0))
    assert found.views_VBCHW.stride() == plain.views_VBCHW.stride()
    assert torch.equal(found.labels_B, plain.labels_B)
    half = plain.views_VBCHW.bfloat16()
    cut_half = torch.where(holes, 0.0, half)
    assert cut_half.dtype == torch.bfloat16
    assert cut_half.stride() == half.stride()


def test_batches_ranks_and_the_step_resumed_at_change_no_pixel() -> None:
    whole = by_sample(cut(resident()).epoch(1))
    assert len(whole) == IMAGES
    ways = [cut(resident(batch_size=5)).epoch(1), cut(resident()).epoch(1, 3)]
    ways += [cut(resident(batch_size=4, rank=rank, world_size=2)).epoch(1) for rank in range(2)]
    for way in ways:
        for sample, views in by_sample(way).items():
            assert torch.equal(views, whole[sample])


def test_a_device_loader_stays_one_and_takes_what_its_epochs_yield() -> None:
    loader, other = cut(resident(drop_last=True)), cut(resident(drop_last=True))
    assert isinstance(loader, DeviceLoader)
    assert (loader.batch_size, loader.is_even, loader.num_samples) == (8, True, IMAGES)
    for epoch, first in ((0, 0), (3, 2), (1, 4)):
        loader.begin(epoch, first)
        for batch in other.epoch(epoch, first):
            assert torch.equal(loader.take().views_VBCHW, batch.views_VBCHW)
    loader.begin(0)
    assert find_obstacle(loader.take) is None
    with pytest.raises(ConfigError, match="step 6: it has 5 steps"):
        loader.begin(0, 6)


def test_a_batch_that_is_served_again_is_not_written_to() -> None:
    options = SyntheticOptions(
        num_samples=24, num_classes=10, image_size=SIDE, batch_size=8, seed=3, device=CPU, num_views=2
    )
    loader = SyntheticTrainLoader(options)
    before = loader.batch.views_VBCHW.clone()
    first, second = (next(iter(cut(loader).epoch(epoch))).views_VBCHW for epoch in range(2))
    assert torch.equal(loader.batch.views_VBCHW, before)
    assert not torch.equal(first, second)


class Closing:
    """A loader that only iterates, and notes what is closed."""

    num_samples, steps_per_epoch = IMAGES, 5

    def __init__(self) -> None:
        self.closed: list[str] = []

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[ViewBatch]:
        try:
            yield from resident().epoch(epoch, first_step)
        finally:
            self.closed.append("epoch")

    def close(self) -> None:
        self.closed.append("loader")


def test_what_a_loader_holds_ends_with_what_is_around_it() -> None:
    inner = Closing()
    loader: Any = cut(inner)
    assert not isinstance(loader, DeviceLoader)
    batches = loader.epoch(0)
    next(batches)
    batches.close()
    loader.close()
    assert inner.closed == ["epoch", "loader"]


def test_without_it_the_loader_is_itself() -> None:
    loader = resident()
    assert with_cutout(loader, 0, SEED, CPU) is loader
