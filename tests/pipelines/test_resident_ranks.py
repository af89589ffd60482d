"""Resident data shared by ranks: together they serve what one alone would, whatever their number."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pcl_fast.contract import ViewBatch
from pcl_fast.errors import ConfigError, DataError
from pipelines.normalisation import NORMALISATIONS
from pipelines.resident import EvalOptions, ResidentEvalLoader, ResidentTrainLoader, TrainOptions
from tests.pipelines.batches import assert_equal

COUNT, GLOBAL_BATCH = 53, 12
COMMON: dict[str, Any] = {
    "num_classes": 10,
    "normalisation": NORMALISATIONS["cifar10"],
    "device": torch.device("cpu"),
    "channels_last": False,
}
TRAIN = TrainOptions(batch_size=GLOBAL_BATCH, num_views=2, seed=7, drop_last=False, **COMMON)
EVAL = EvalOptions(batch_size=4, **COMMON)


def data(count: int) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(count)
    images = torch.randint(0, 256, (count, 3, 9, 8), dtype=torch.uint8, generator=draws)
    return images, torch.randint(0, 10, (count,), generator=draws)


def ranks(world_size: int, count: int = COUNT, **changes: Any) -> list[ResidentTrainLoader]:
    """The loaders of all ranks, whose batches add up to the same whatever their number."""
    options = replace(TRAIN, batch_size=GLOBAL_BATCH // world_size, world_size=world_size, **changes)
    return [ResidentTrainLoader(*data(count), replace(options, rank=rank)) for rank in range(world_size)]


def joined(parts: tuple[ViewBatch, ...]) -> ViewBatch:
    return ViewBatch(
        torch.cat([part.views_VBCHW for part in parts], 1),
        torch.cat([part.labels_B for part in parts]),
        torch.cat([part.sample_ids_B for part in parts]),
    )


def global_batches(loaders: list[ResidentTrainLoader], epoch: int, first_step: int = 0) -> list[ViewBatch]:
    """Every step's batch of all ranks; all have as many."""
    return [joined(parts) for parts in zip(*(rank.epoch(epoch, first_step) for rank in loaders), strict=True)]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_global_batch_is_that_of_one_rank(world_size: int, drop_last: bool, channels_last: bool) -> None:
    changes = {"drop_last": drop_last, "channels_last": channels_last}
    loaders, (alone,) = ranks(world_size, **changes), ranks(1, **changes)
    whole = list(alone.epoch(2))
    assert len(whole) == (4 if drop_last else 5)
    assert {loader.steps_per_epoch for loader in loaders} == {len(whole)}
    for step in range(len(whole) + 1):
        assert_equal(global_batches(loaders, 2, step), whole[step:])


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_have_as_many_samples_but_for_the_last_batch(world_size: int) -> None:
    sizes = [[len(batch.labels_B) for batch in loader.epoch(0)] for loader in ranks(world_size)]
    assert {size for of_rank in sizes for size in of_rank[:-1]} == {GLOBAL_BATCH // world_size}
    last = [of_rank[-1] for of_rank in sizes]
    assert sum(last) == COUNT % GLOBAL_BATCH
    assert max(last) - min(last) <= 1


@pytest.mark.parametrize("step", [0, 1, 3, 5])
def test_another_number_of_ranks_ends_the_epoch(step: int) -> None:
    begun = global_batches(ranks(2), epoch=1)[:step]
    ended = global_batches(ranks(1), epoch=1, first_step=step)
    ids = torch.cat([batch.sample_ids_B for batch in (*begun, *ended)])
    assert torch.equal(ids.sort().values, torch.arange(COUNT)), "none is lost and none repeated"


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_what_ranks_take_on_the_device_is_what_their_epochs_yield(world_size: int) -> None:
    for loader in ranks(world_size, drop_last=True):
        assert loader.is_even
        assert loader.batch_size == GLOBAL_BATCH // world_size
        for epoch, first in ((0, 0), (3, 2), (1, 0)):
            loader.begin(epoch, first)
            assert_equal([loader.take() for _ in range(first, 4)], list(loader.epoch(epoch, first)))


@pytest.mark.parametrize(("count", "even"), [(48, True), (53, False), (12, True), (11, False)])
def test_even_is_an_epoch_of_full_batches_on_every_rank(count: int, even: bool) -> None:
    assert {loader.is_even for loader in ranks(3, count)} == {even}


@pytest.mark.parametrize("count", range(1, 11))
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_evaluation_gives_every_sample_to_one_rank(count: int, world_size: int) -> None:
    """A rank may have none at all."""
    images, labels = data(count)
    loaders = [
        ResidentEvalLoader(images, labels, replace(EVAL, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    (whole,) = ResidentEvalLoader(images, labels, replace(EVAL, batch_size=count))
    batches = [batch for loader in loaders for batch in loader]
    assert torch.equal(torch.cat([batch.images_BCHW for batch in batches]), whole.images_BCHW)
    assert torch.equal(torch.cat([batch.labels_B for batch in batches]), labels)
    assert all(1 <= len(batch.labels_B) <= EVAL.batch_size for batch in batches)
    assert {loader.num_samples for loader in loaders} == {count}


def test_what_cannot_be_shared_is_refused() -> None:
    with pytest.raises(ConfigError, match="the last batch has 2 images for 3 ranks"):
        ranks(3, count=50)
    with pytest.raises(DataError, match="11 training samples do not fill one batch of 12"):
        ranks(3, count=11, drop_last=True)
    for rank, world_size in ((2, 2), (-1, 2), (0, 0)):
        for options in (TRAIN, EVAL):
            with pytest.raises(ConfigError, match=f"rank {rank} of {world_size} cannot be served"):
                replace(options, rank=rank, world_size=world_size)
