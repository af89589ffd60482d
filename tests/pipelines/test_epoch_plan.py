"""Ranks share each global batch exactly, whatever their number, and an epoch goes on from any step."""

import dataclasses

import numpy as np
import pytest
import torch

from pcl_fast.errors import ConfigError, DataError
from pipelines.normalisation import NORMALISATIONS
from pipelines.options import ImageTrainOptions
from pipelines.order import EpochPlan, epoch_order, page_order, share

CPU = torch.device("cpu")
GLOBAL_BATCH = 12
PAGE_OF_N = np.arange(103) // 10
OPTIONS = ImageTrainOptions(
    batch_size=GLOBAL_BATCH,
    num_classes=10,
    normalisation=NORMALISATIONS["imagenet"],
    device=CPU,
    channels_last=False,
    num_views=1,
    seed=5,
    drop_last=False,
    window_pages=3,
)


def plans(world_size: int, samples: int = 103, **changes: object) -> list[EpochPlan]:
    options = dataclasses.replace(
        OPTIONS, batch_size=GLOBAL_BATCH // world_size, world_size=world_size, **changes
    )
    return [
        EpochPlan.of(samples, dataclasses.replace(options, rank=rank), PAGE_OF_N)
        for rank in range(world_size)
    ]


@pytest.mark.parametrize("order", ["shuffled", "pages"])
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_share_every_global_batch_of_the_order(world_size: int, drop_last: bool, order: str) -> None:
    whole = epoch_order(103, 5, 4, CPU) if order == "shuffled" else page_order(PAGE_OF_N, 3, 5, 4)
    expected = whole.split(GLOBAL_BATCH)[: 8 if drop_last else 9]
    ranks = [plan.batches(4) for plan in plans(world_size, drop_last=drop_last, order=order)]
    assert {len(batches) for batches in ranks} == {len(expected)}
    for step, global_batch in enumerate(expected):
        parts = [batches[step] for batches in ranks]
        assert torch.equal(torch.cat(parts), global_batch)
        assert max(map(len, parts)) - min(map(len, parts)) <= (len(global_batch) < GLOBAL_BATCH)


@pytest.mark.parametrize("order", ["shuffled", "pages"])
@pytest.mark.parametrize("step", [0, 1, 4, 8, 9])
def test_another_number_of_ranks_goes_on_with_what_is_left(step: int, order: str) -> None:
    seen = [ids for plan in plans(2, order=order) for ids in plan.batches(0)[:step]]
    left = [ids for plan in plans(3, order=order) for ids in plan.batches(0, step)]
    everything = torch.cat([*seen, *left])
    assert torch.equal(everything.sort().values, torch.arange(103)), "none is lost and none repeated"


def test_only_the_first_samples_of_a_subset() -> None:
    (plan,) = plans(1, subset=30, order="pages")
    assert (plan.num_samples, plan.steps_per_epoch) == (30, 3)
    assert torch.equal(torch.cat(list(plan.batches(0))).sort().values, torch.arange(30))


@pytest.mark.parametrize(("count", "world_size"), [(103, 2), (103, 3), (2, 3), (0, 2), (1, 1), (50_000, 8)])
def test_shares_are_disjoint_complete_and_even(count: int, world_size: int) -> None:
    parts = [range(count)[share(count, rank, world_size)] for rank in range(world_size)]
    assert [sample for part in parts for sample in part] == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_what_cannot_be_planned_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--data\.subset 104: the training set has 103 images"):
        plans(1, subset=104)
    with pytest.raises(ConfigError, match=r"--data\.order pages: a folder has no pages"):
        EpochPlan.of(103, dataclasses.replace(OPTIONS, order="pages"))
    with pytest.raises(DataError, match="11 training images do not fill one batch of 12"):
        plans(3, samples=11, drop_last=True)
    with pytest.raises(ConfigError, match="the last batch has 2 images for 3 ranks"):
        plans(3, samples=14)
    (plan,) = plans(1)
    with pytest.raises(ConfigError, match="step 10: it has 9 steps"):
        plan.batches(0, 10)
