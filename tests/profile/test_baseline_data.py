"""The straightforward loader: every image once, its views as torchvision's users make them."""

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch

from pcl_fast.first_batch import check_views
from pcl_fast.profile.baseline_data import PADDING, PlainLoader, PlainOptions

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.1)
IMAGES, SIDE = 22, 12
CPU = torch.device("cpu")


def loader(**changes: Any) -> PlainLoader:
    """Image i has the value 10 (i + 1) everywhere."""
    options: dict[str, Any] = {
        "batch_size": 4,
        "num_views": 2,
        "mean": MEAN,
        "std": STD,
        "device": CPU,
        "channels_last": "off",
        "workers": 0,
        "drop_last": True,
    }
    values = 10 * torch.arange(1, IMAGES + 1)
    images = values.view(-1, 1, 1, 1).expand(-1, 3, SIDE, SIDE).to(torch.uint8)
    return PlainLoader(images, torch.arange(IMAGES) % 7, PlainOptions(**(options | changes)))


def test_an_epoch_has_every_image_once() -> None:
    plain = loader(drop_last=False)
    epochs = [[int(i) for batch in plain.epoch(epoch) for i in batch.sample_ids_B] for epoch in range(2)]
    assert all(sorted(ids) == list(range(IMAGES)) for ids in epochs)
    assert epochs[0] != epochs[1]
    assert (plain.num_samples, plain.steps_per_epoch, loader().steps_per_epoch) == (IMAGES, 6, 5)
    assert len(list(plain.epoch(2, first_step=4))) == 2


@pytest.mark.parametrize("views", [1, 3])
def test_views_are_crops_of_the_padded_normalised_image(views: int) -> None:
    """Each pixel is the image's value or, in up to 4 rows and columns at one side, that of the padding."""
    seen: set[int] = set()
    for batch in loader(num_views=views).epoch(0):
        check_views(batch, views, 7, CPU)
        assert torch.equal(batch.labels_B, batch.sample_ids_B % 7)
        value_B = 10.0 * (batch.sample_ids_B + 1) / 255
        for view_BCHW in batch.views_VBCHW:
            for channel, (mean, std) in enumerate(zip(MEAN, STD, strict=True)):
                pixels_BHW = view_BCHW[:, channel]
                inside_BHW = (pixels_BHW - ((value_B - mean) / std).view(-1, 1, 1)).abs() < 1e-5
                padding_BHW = (pixels_BHW + mean / std).abs() < 1e-5
                assert (inside_BHW | padding_BHW).all()
                rows_BH, columns_BW = inside_BHW.any(2), inside_BHW.any(1)
                assert torch.equal(inside_BHW, rows_BH[:, :, None] & columns_BW[:, None, :])
                assert (rows_BH.sum(1) >= SIDE - PADDING).all()
                seen |= set((SIDE - rows_BH.sum(1)).tolist())
    assert len(seen) >= 3, "crops differ"


@pytest.mark.parametrize(("layout", "form"), [("on", torch.channels_last), ("off", torch.contiguous_format)])
def test_the_layout_is_the_one_asked_for(layout: str, form: torch.memory_format) -> None:
    batch = next(loader(channels_last=layout).epoch(0))
    assert batch.views_VBCHW.shape == (2, 4, 3, SIDE, SIDE)
    assert all(view.is_contiguous(memory_format=form) for view in batch.views_VBCHW)


def test_workers_live_from_epoch_to_epoch_and_end_with_it_all(tmp_path: Path) -> None:
    before = set(multiprocessing.active_children())

    def workers() -> set[Any]:
        return set(multiprocessing.active_children()) - before

    plain = loader(workers=2)
    assert workers() == set()
    assert len(list(plain.epoch(0))) == 5
    first = workers()
    assert len(first) == 2
    batches = plain.epoch(1)
    ids = [int(i) for i in next(batches).sample_ids_B]
    assert len(set(ids)) == 4
    assert workers() == first
    batches.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert workers() == set(), "an epoch left early"
    assert len(list(plain.epoch(2))) == 5
    plain.close()
    plain.close()
    assert workers() == set()
