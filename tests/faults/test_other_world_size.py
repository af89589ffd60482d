"""An epoch begun by some ranks and ended by others: no sample is lost, none comes twice, no pixel differs."""

from pathlib import Path

import pytest

from pcl_fast.contract import ViewBatch, close_if_possible
from tests.pipelines.any_loader import DECODERS, IMAGES, open_loader, write_photos
from tests.pipelines.batches import by_sample

GLOBAL_BATCH, EPOCH = 6, 3
WORLDS = [(2, 1), (1, 3)]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos"))


def served(name: str, photos: Path, world_size: int, steps: slice) -> list[ViewBatch]:
    """What all ranks of a world get of some steps of the epoch."""
    batches: list[ViewBatch] = []
    for rank in range(world_size):
        place = {"batch_size": GLOBAL_BATCH // world_size, "rank": rank, "world_size": world_size}
        loader = open_loader(name, photos, **place)
        epoch = loader.epoch(EPOCH, steps.start)
        batches += [batch for _, batch in zip(range(steps.stop - steps.start), epoch, strict=False)]
        close_if_possible(epoch)
    return batches


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("before", "after"), WORLDS)
@pytest.mark.parametrize("name", ["resident", *DECODERS])
def test_an_epoch_ended_by_another_number_of_ranks(photos: Path, name: str, before: int, after: int) -> None:
    steps = -(-IMAGES // GLOBAL_BATCH)
    begun = served(name, photos, before, slice(0, 2))
    ended = served(name, photos, after, slice(2, steps))
    found, alone = by_sample([*begun, *ended]), by_sample(served(name, photos, 1, slice(0, steps)))
    assert found.keys() == alone.keys() == set(range(IMAGES))
    for sample, (views_VCHW, label) in alone.items():
        assert label == found[sample][1]
        assert views_VCHW.equal(found[sample][0])
