"""Images held out of training: drawn by the seed, the same ones for every backend, rank and epoch."""

import dataclasses
from typing import Any

import pytest
import torch

from datasets_prep.cifar import load_cifar
from pcl_fast.commands.data import open_data, opened_data
from pcl_fast.config import Config, DataConfig
from pcl_fast.contract import EvalLoader, OpenData
from pcl_fast.errors import ConfigError
from pcl_fast.figures import run_figures
from pipelines.normalisation import NORMALISATIONS
from pipelines.order import held_out_ids, kept_ids
from tests.commands.test_data import IMAGES, VIEWS, configs, configured, photos

__all__ = ["configs", "photos"]  # fixtures
HELD, CIFAR_IMAGES = 5, 100


def with_held_out(data: DataConfig, ranks: int | None = None, held: int = HELD, **changes: Any) -> Config:
    return configured(dataclasses.replace(data, hold_out=held, **changes), ranks)


def served(data: OpenData, epochs: int = 2) -> set[int]:
    """The samples that are trained on, by their places in the data set."""
    return {int(i) for e in range(epochs) for batch in data.train.epoch(e) for i in batch.sample_ids_B}


def images_of(loader: EvalLoader | None) -> torch.Tensor:
    assert loader is not None
    return torch.cat([batch.images_BCHW for batch in loader])


def test_the_seed_alone_draws_them() -> None:
    drawn = held_out_ids(1000, 100, 3)
    kept = kept_ids(1000, 100, 3)
    assert kept is not None
    assert torch.equal(torch.cat([drawn, kept]).sort().values, torch.arange(1000))
    assert torch.equal(drawn, drawn.unique())
    assert set(held_out_ids(1000, 50, 3).tolist()) < set(drawn.tolist()), "fewer are some of the same"
    assert not torch.equal(drawn, held_out_ids(1000, 100, 4))
    tenths = torch.stack([held_out_ids(1000, 100, s) // 100 for s in range(100)]).flatten().bincount()
    assert ((tenths - 1000).abs() < 150).all(), "5 standard deviations: of every class as many"
    assert kept_ids(1000, 0, 3) is None
    with pytest.raises(ConfigError, match=r"--data\.hold-out 7: of 7 training images; hold out fewer"):
        held_out_ids(7, 7, 0)


@pytest.mark.parametrize("backend", ["resident", "torch"])
@pytest.mark.parametrize("more", [{}, {"subset": 20}, {"order": "pages", "window_pages": 1}], ids=str)
def test_they_are_never_trained_on_and_all_others_are(
    configs: dict[str, DataConfig], backend: str, more: dict[str, Any]
) -> None:
    config = with_held_out(configs[backend], drop_last=False, **more)
    available = more.get("subset", CIFAR_IMAGES if backend == "resident" else IMAGES)
    drawn = set(held_out_ids(available, HELD, config.seed).tolist())
    assert len(drawn) == HELD
    with opened_data(config, VIEWS) as data:
        assert served(data) == set(range(available)) - drawn
        assert data.train.num_samples == available - HELD
        assert data.train.steps_per_epoch == -(-(available - HELD) // 8)
        assert data.held_out is not None
        assert data.held_out.num_samples == len(images_of(data.held_out)) == HELD


@pytest.mark.parametrize("backend", ["ffcv", "dali"])
def test_other_decoders_hold_out_the_same_ones(configs: dict[str, DataConfig], backend: str) -> None:
    pytest.importorskip("ffcv" if backend == "ffcv" else "nvidia.dali")
    config = with_held_out(configs["torch"])
    other = with_held_out(configs["torch"], backend=backend, workers=1)
    with opened_data(config, VIEWS) as data, opened_data(other, VIEWS) as same:
        pairs = zip(data.train.epoch(0), same.train.epoch(0), strict=True)
        assert all(torch.equal(one.sample_ids_B, two.sample_ids_B) for one, two in pairs)
        assert (images_of(data.held_out) - images_of(same.held_out)).abs().max() < 0.1


def test_they_are_seen_as_in_evaluation(configs: dict[str, DataConfig]) -> None:
    """Un-augmented, normalised, with their labels."""
    arrays = load_cifar("cifar10", None)
    config = with_held_out(configs["resident"])
    ids = held_out_ids(CIFAR_IMAGES, HELD, config.seed)
    rule = NORMALISATIONS["cifar10"]
    mean, std = (torch.tensor(values)[:, None, None] for values in (rule.mean, rule.std))
    with opened_data(config, VIEWS) as data:
        expected = (torch.from_numpy(arrays.train_images)[ids] / 255 - mean) / std
        torch.testing.assert_close(images_of(data.held_out), expected, rtol=0, atol=1e-5)
        assert data.held_out is not None
        labels = torch.cat([batch.labels_B for batch in data.held_out])
        assert torch.equal(labels, torch.from_numpy(arrays.train_labels)[ids])


@pytest.mark.parametrize("backend", ["resident", "torch", "synthetic"])
def test_ranks_share_them(configs: dict[str, DataConfig], backend: str) -> None:
    alone, shared = (with_held_out(configs[backend], ranks) for ranks in (None, 2))
    with (
        opened_data(alone, VIEWS) as data,
        opened_data(shared, VIEWS) as first,
        opened_data(shared, VIEWS, rank=1) as second,
    ):
        parts = [images_of(each.held_out) for each in (first, second)]
        assert [len(part) for part in parts] == [2, 3]
        if backend != "synthetic":  # whose ranks have noise of their own
            assert torch.equal(torch.cat(parts), images_of(data.held_out))


@pytest.mark.usefixtures("small_cifar")
def test_none_are_held_out_unless_that_is_asked_for() -> None:
    plain = configured(DataConfig(), None)
    with opened_data(plain, VIEWS) as data:
        assert data.held_out is None
        assert len(served(data, epochs=9)) == CIFAR_IMAGES
    held = run_figures(with_held_out(DataConfig(), held=10_000))
    assert (held.train_images, held.steps_per_epoch) == (40_000, 5_000)


@pytest.mark.usefixtures("small_cifar")
@pytest.mark.parametrize("held", [CIFAR_IMAGES, 10**6])
def test_something_must_be_left(held: int) -> None:
    config = with_held_out(DataConfig(), held=held)
    with pytest.raises(ConfigError, match=rf"--data\.hold-out {held}: of 100 training images"):
        open_data(config, VIEWS)
    with pytest.raises(ConfigError, match=r"--data\.hold-out -1: give at least 0"):
        DataConfig(hold_out=-1)
