"""A feed gives the very batches of its loader, where they are wanted, and holds on to nothing."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from pcl_fast.contract import DeviceLoader, TrainLoader, ViewBatch
from pcl_fast.errors import ConfigError, DataError
from pcl_fast.step.feed import DeviceFeed, Feed, HostFeed, make_feed
from pipelines.augment import NORMALISATIONS
from pipelines.resident import ResidentTrainLoader, TrainOptions
from pipelines.synthetic import SyntheticOptions, SyntheticTrainLoader

CPU = torch.device("cpu")
COUNT, BATCH, STEPS = 43, 8, 5
KINDS = ["device", "host", "host, fixed", "host, fixed, uneven", "synthetic"]


def resident(**changes: Any) -> ResidentTrainLoader:
    draws = torch.Generator().manual_seed(2)
    images = torch.randint(0, 256, (COUNT, 3, 12, 12), dtype=torch.uint8, generator=draws)
    labels = torch.randint(0, 10, (COUNT,), generator=draws)
    options: dict[str, Any] = {
        "batch_size": BATCH,
        "num_classes": 10,
        "normalisation": NORMALISATIONS["cifar10"],
        "device": CPU,
        "channels_last": True,
        "num_views": 2,
        "seed": 7,
        "drop_last": True,
    }
    return ResidentTrainLoader(images, labels, TrainOptions(**(options | changes)))


class HostOnly:
    """A loader of which only the iterator is known, as of all that read files; notes what becomes of it."""

    def __init__(self, loader: TrainLoader) -> None:
        self.loader = loader
        self.num_samples, self.steps_per_epoch = loader.num_samples, loader.steps_per_epoch
        self.open = self.begun = 0

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[ViewBatch]:
        batches = self.loader.epoch(epoch, first_step)
        return self._noted(batches)

    def _noted(self, batches: Iterator[ViewBatch]) -> Iterator[ViewBatch]:
        self.open, self.begun = self.open + 1, self.begun + 1
        try:
            yield from batches
        finally:
            self.open -= 1


def synthetic() -> SyntheticTrainLoader:
    options = SyntheticOptions(
        num_samples=COUNT, num_classes=10, image_size=12, batch_size=BATCH, seed=3, device=CPU, num_views=2
    )
    return SyntheticTrainLoader(options)


def ignore(batch: ViewBatch) -> None:
    """A check that is content with everything."""


def pair(kind: str) -> tuple[Feed, TrainLoader]:
    """A feed of each kind, and a loader that yields what it should."""
    uneven = kind == "host, fixed, uneven"
    loader = synthetic() if kind == "synthetic" else resident(drop_last=not uneven)
    other = HostOnly(loader) if kind.startswith("host") and not uneven else loader
    feed = make_feed(other, ignore, fixed="fixed" in kind)
    assert isinstance(feed, DeviceFeed if kind in ("device", "synthetic") else HostFeed)
    return feed, synthetic() if kind == "synthetic" else resident(drop_last=not uneven)


def tensors(batch: ViewBatch) -> tuple[Tensor, Tensor, Tensor]:
    return batch.views_VBCHW, batch.labels_B, batch.sample_ids_B


def assert_same(one: ViewBatch, other: ViewBatch) -> None:
    for mine, theirs in zip(tensors(one), tensors(other), strict=True):
        assert mine.dtype == theirs.dtype
        assert mine.stride() == theirs.stride()
        assert torch.equal(mine, theirs)


def advance(feed: Feed) -> int | None:
    """How many images the next batch has."""
    shape = feed.advance()
    return None if shape is None else shape.images


def all_of(feed: Feed, epoch: int, first_step: int) -> Iterator[ViewBatch]:
    """The batches of an epoch, each as it is while it is ready; their sizes are checked."""
    feed.begin(epoch, first_step)
    while (shape := feed.advance()) is not None:
        batch = feed.take()
        assert len(batch.labels_B) == batch.views_VBCHW.shape[1] == shape.images
        assert shape.pixels in (None, batch.views_VBCHW.shape[-1])
        yield batch
    feed.close()


@pytest.mark.parametrize("kind", KINDS)
def test_the_very_batches_of_the_loader_from_any_step_on(kind: str) -> None:
    feed, loader = pair(kind)
    for epoch, first in ((0, 0), (1, 0), (2, 3), (3, STEPS), (0, 0)):
        expected = list(loader.epoch(epoch, first))
        assert len(expected) == loader.steps_per_epoch - first
        for found, batch in itertools.zip_longest(all_of(feed, epoch, first), expected):
            assert_same(found, batch)


@pytest.mark.parametrize("kind", ["device", "host", "synthetic"])
def test_batches_may_be_kept(kind: str) -> None:
    feed, loader = pair(kind)
    kept = [batch for epoch in range(2) for batch in all_of(feed, epoch, 0)]
    expected = [batch for epoch in range(2) for batch in loader.epoch(epoch)]
    for found, batch in zip(kept, expected, strict=True):
        assert_same(found, batch)


@pytest.mark.parametrize("fixed", [True, False])
def test_fixed_places_are_one_for_each_size_and_for_ever(fixed: bool) -> None:
    feed = make_feed(resident(drop_last=False), ignore, fixed)
    places: dict[int, set[tuple[int, ...]]] = {}
    kept: list[ViewBatch] = []
    for epoch in range(3):
        for batch in all_of(feed, epoch, 0):
            kept.append(batch)  # so that no memory is used twice
            addresses = tuple(tensor.data_ptr() for tensor in tensors(batch))
            places.setdefault(len(batch.labels_B), set()).add(addresses)
    assert places.keys() == {BATCH, COUNT % BATCH}
    assert [len(found) for found in places.values()] == ([1, 1] if fixed else [3 * STEPS, 3])


def test_what_the_loader_made_is_not_written_to_for_a_fixed_place() -> None:
    """A loader may serve a batch twice."""
    loader = HostOnly(synthetic())
    before = synthetic().batch
    feed = make_feed(loader, ignore, fixed=True)
    for batch in all_of(feed, 0, 0):
        batch.views_VBCHW.zero_()
    assert_same(next(iter(loader.epoch(0))), before)


@pytest.mark.parametrize("kind", ["device", "host", "host, fixed"])
def test_the_check_sees_the_first_batch_before_the_step_does(kind: str) -> None:
    seen: list[ViewBatch] = []
    loader = resident() if kind == "device" else HostOnly(resident())
    feed = make_feed(loader, seen.append, fixed="fixed" in kind)
    batches = list(all_of(feed, 0, 2))
    (expected, *_) = resident().epoch(0, 2)
    assert len(batches) == STEPS - 2
    assert len(seen) == 1
    assert_same(seen[0], expected)
    list(all_of(feed, 1, 0))
    assert len(seen) == (1 if kind == "device" else 2), "one look suffices for a device's loader"


@pytest.mark.parametrize("kind", ["device", "host"])
def test_a_check_can_stop_before_anything_is_trained_on(kind: str) -> None:
    def refuse(batch: ViewBatch) -> None:
        raise DataError("not as agreed")

    loader: Any = resident() if kind == "device" else HostOnly(resident())
    feed = make_feed(loader, refuse, fixed=False)
    with pytest.raises(DataError, match="not as agreed"):
        next(all_of(feed, 0, 0))
    if kind == "host":
        assert (loader.begun, loader.open) == (1, 0), "what the loader held was ended"
    with pytest.raises(DataError, match="not as agreed"):
        next(all_of(feed, 0, 0))


def test_an_open_epoch_ends_with_close_with_the_next_and_at_its_end() -> None:
    loader = HostOnly(resident())
    feed = make_feed(loader, ignore, fixed=False)
    feed.close()  # nothing is open
    feed.begin(0, 0)
    assert advance(feed) == BATCH
    assert loader.open == 1
    feed.close()
    assert loader.open == 0
    assert feed.advance() is None
    feed.begin(1, 0)
    assert advance(feed) == BATCH
    feed.begin(2, 0)
    assert advance(feed) == BATCH
    assert (loader.open, loader.begun) == (1, 3)
    assert [advance(feed) for _ in range(STEPS)] == [BATCH] * (STEPS - 1) + [None]
    assert loader.open == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_beyond_the_epoch_is_refused(kind: str) -> None:
    feed, loader = pair(kind)
    steps = loader.steps_per_epoch
    with pytest.raises(ConfigError, match=f"step {steps + 1}: it has {steps} steps"):
        feed.begin(0, steps + 1)


def test_a_loader_of_the_device_is_known_by_what_it_can() -> None:
    assert isinstance(resident(), DeviceLoader)
    assert not isinstance(HostOnly(resident()), DeviceLoader)
    assert isinstance(make_feed(resident(drop_last=False), ignore, fixed=True), HostFeed)
