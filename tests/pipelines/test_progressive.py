"""Progressive resizing: each epoch has the views that a loader of that size alone would give."""

from pathlib import Path

import pytest
import torch

from pcl_fast.errors import ConfigError
from tests.pipelines.any_loader import DECODERS, open_loader, write_photos
from tests.pipelines.batches import assert_equal

SIZES = (8, 24, 13)
FULL = 20


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos"))


@pytest.mark.parametrize("name", DECODERS)
def test_an_epoch_is_that_of_a_loader_of_its_size(photos: Path, name: str) -> None:
    loader = open_loader(name, photos, image_size=FULL, epoch_sizes=SIZES)
    for epoch in (0, 1, 3, 0, 7):
        size = SIZES[epoch] if epoch < len(SIZES) else FULL
        found = list(loader.epoch(epoch))
        assert {tuple(batch.views_VBCHW.shape[2:]) for batch in found} == {(3, size, size)}
        assert_equal(found, list(open_loader(name, photos, image_size=size).epoch(epoch)))


@pytest.mark.parametrize("name", DECODERS)
def test_epochs_of_two_sizes_at_once_do_not_disturb_each_other(photos: Path, name: str) -> None:
    loader = open_loader(name, photos, image_size=FULL, epoch_sizes=SIZES)
    alone = [list(loader.epoch(epoch)) for epoch in (0, 1)]
    at_once = list(zip(loader.epoch(0), loader.epoch(1), strict=True))
    for place, batches in enumerate(alone):
        assert_equal([pair[place] for pair in at_once], batches)


@pytest.mark.parametrize("name", DECODERS)
def test_ranks_and_resumed_epochs_have_the_same_size(photos: Path, name: str) -> None:
    sizes = {"image_size": FULL, "epoch_sizes": SIZES}
    whole = list(open_loader(name, photos, **sizes).epoch(2))
    ranks = [open_loader(name, photos, batch_size=3, rank=rank, world_size=2, **sizes) for rank in range(2)]
    for step in (0, 3):
        parts = zip(*(rank.epoch(2, step) for rank in ranks), strict=True)
        for batch, (first, second) in zip(whole[step:], parts, strict=True):
            joined = torch.cat([first.views_VBCHW, second.views_VBCHW], 1)
            assert torch.equal(joined, batch.views_VBCHW)


def test_a_size_of_nothing_is_refused(photos: Path) -> None:
    with pytest.raises(ConfigError, match="least size of an epoch of a loader is 0: it must be at least 1"):
        open_loader("torch", photos, epoch_sizes=(8, 0))
