"""Batches of any loader: by sample, compared, and iterators that end in every way there is."""

import dataclasses
import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from pcl_fast.contract import ViewBatch

ENDS = ("exhaust", "close", "drop", "raise")


def by_sample(batches: list[ViewBatch]) -> dict[int, tuple[Tensor, int]]:
    """Views [V, C, H, W] and label of each sample; no sample comes twice."""
    found = {
        int(sample): (batch.views_VBCHW[:, place], int(batch.labels_B[place]))
        for batch in batches
        for place, sample in enumerate(batch.sample_ids_B)
    }
    assert len(found) == sum(len(batch.labels_B) for batch in batches)
    return found


def assert_equal(some: list[ViewBatch], others: list[ViewBatch]) -> None:
    assert len(some) == len(others)
    for one, other in zip(some, others, strict=True):
        for field in dataclasses.fields(one):
            assert torch.equal(getattr(one, field.name), getattr(other, field.name)), field.name


def end_iterator(iterators: list[Iterator[Any]], end: str, left: int) -> None:
    """End the only iterator of a list, which has `left` batches yet, in one of the ways of ENDS."""
    match end:
        case "exhaust":
            assert len(list(iterators[0])) == left
        case "close":
            iterators[0].close()  # pyright: ignore[reportAttributeAccessIssue]
        case "drop":
            iterators.clear()
            gc.collect()
        case _:
            with pytest.raises(KeyError):
                iterators[0].throw(KeyError())  # pyright: ignore[reportAttributeAccessIssue]
