"""Loaders that make their batches on the device alone: `begin` and `take` against `epoch`."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pcl_fast.contract import DeviceLoader, ViewBatch
from pcl_fast.errors import ConfigError
from pcl_fast.step.obstacles import find_obstacle
from pipelines.augment import NORMALISATIONS
from pipelines.resident import ResidentTrainLoader, TrainOptions
from pipelines.synthetic import SyntheticOptions, SyntheticTrainLoader

CPU = torch.device("cpu")
OPTIONS = TrainOptions(
    batch_size=8,
    num_classes=10,
    normalisation=NORMALISATIONS["cifar10"],
    device=CPU,
    channels_last=False,
    num_views=3,
    seed=7,
    drop_last=True,
)
NOISE = SyntheticOptions(
    num_samples=43, num_classes=10, image_size=12, batch_size=8, seed=3, device=CPU, num_views=3
)


def resident(count: int = 43, **changes: object) -> ResidentTrainLoader:
    draws = torch.Generator().manual_seed(count)
    images = torch.randint(0, 256, (count, 3, 12, 12), dtype=torch.uint8, generator=draws)
    labels = torch.randint(0, 10, (count,), generator=draws)
    return ResidentTrainLoader(images, labels, replace(OPTIONS, **changes))  # pyright: ignore[reportArgumentType]


LOADERS: dict[str, Callable[[], DeviceLoader]] = {
    "resident": resident,
    "resident, channels-last": lambda: resident(channels_last=True),
    "resident, one view": lambda: resident(num_views=1),
    "synthetic": lambda: SyntheticTrainLoader(NOISE),
}


def tensors(batch: ViewBatch) -> tuple[Tensor, Tensor, Tensor]:
    return batch.views_VBCHW, batch.labels_B, batch.sample_ids_B


def assert_same(one: ViewBatch, other: ViewBatch) -> None:
    for mine, theirs in zip(tensors(one), tensors(other), strict=True):
        assert mine.dtype == theirs.dtype
        assert mine.stride() == theirs.stride()
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("name", LOADERS)
def test_what_is_taken_is_what_the_epoch_yields_from_any_step_on(name: str) -> None:
    loader, other = LOADERS[name](), LOADERS[name]()
    assert isinstance(loader, DeviceLoader)
    assert loader.is_even
    for epoch, first in ((0, 0), (1, 0), (1, 3), (4, 4), (0, 0), (2, 1)):
        expected = list(other.epoch(epoch, first))
        assert len(expected) == loader.steps_per_epoch - first > 0
        loader.begin(epoch, first)
        for batch in expected:
            assert len(batch.labels_B) == loader.batch_size
            assert_same(loader.take(), batch)


@pytest.mark.parametrize("name", LOADERS)
def test_a_step_that_the_epoch_does_not_have_is_refused(name: str) -> None:
    loader = LOADERS[name]()
    with pytest.raises(ConfigError, match="step 6: it has 5 steps"):
        loader.begin(0, 6)


@pytest.mark.parametrize("name", LOADERS)
def test_what_was_taken_is_not_written_to(name: str) -> None:
    loader = LOADERS[name]()
    taken: list[tuple[ViewBatch, tuple[Tensor, ...]]] = []
    for epoch in range(3):
        loader.begin(epoch)
        for _ in range(loader.steps_per_epoch):
            batch = loader.take()
            taken.append((batch, tuple(tensor.clone() for tensor in tensors(batch))))
    for batch, before in taken:
        assert all(map(torch.equal, tensors(batch), before))


def test_epochs_are_laid_out_in_the_same_memory() -> None:
    """Or a graph that holds `take` would go on reading the first."""
    loader = resident()
    addresses: list[list[int]] = []
    for epoch in range(3):
        loader.begin(epoch, epoch)
        assert loader._laid is not None
        addresses.append([tensor.data_ptr() for tensor in (*loader._laid, loader._step)])
        loader.take()
        assert [tensor.data_ptr() for tensor in (*loader._laid, loader._step)] == addresses[0]
    assert addresses[0] == addresses[1] == addresses[2]


def test_an_epoch_read_in_between_disturbs_nothing() -> None:
    """As by whoever looks at a loader while it trains."""
    loader, alone = resident(), resident()
    loader.begin(1)
    alone.begin(1)
    first = loader.take()
    assert_same(first, alone.take())
    list(loader.epoch(0))
    for _ in range(loader.steps_per_epoch - 1):
        assert_same(loader.take(), alone.take())


@pytest.mark.parametrize("name", LOADERS)
def test_taking_asks_the_device_for_no_value(name: str) -> None:
    loader = LOADERS[name]()
    loader.begin(0)
    assert find_obstacle(loader.take) is None


@pytest.mark.parametrize(
    ("count", "drop_last", "even"),
    [(43, True, True), (43, False, False), (40, False, True), (40, True, True), (5, False, False)],
)
def test_even_is_an_epoch_of_full_batches(count: int, drop_last: bool, even: bool) -> None:
    loader = resident(count, drop_last=drop_last)
    assert loader.is_even == even
    assert ({len(batch.labels_B) for batch in loader.epoch(0)} == {8}) == even
