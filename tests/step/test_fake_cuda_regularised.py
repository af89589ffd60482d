"""Mixup, smoothing, cutout and colour jitter on a pretended CUDA device: a step asks the host for nothing."""

import dataclasses
from typing import Any

import pytest

from pcl_fast.config import Config
from pcl_fast.contract import DeviceLoader, TrainLoader
from pcl_fast.step.feed import Feed, make_feed
from pcl_fast.step.obstacles import find_obstacle
from pipelines.colours import ColourRule
from pipelines.cutout import with_cutout
from pipelines.resident import ResidentTrainLoader
from tests.step import test_fake_cuda
from tests.step.test_fake_cuda import CUDA, fake_cuda, make_step, strays_of

__all__ = ["fake_cuda"]  # a fixture


@pytest.fixture
def regularised(monkeypatch: pytest.MonkeyPatch) -> None:
    """Configurations with mixup and smoothing, loaders with cutout and colours."""
    usual = test_fake_cuda.tiny_config

    def changed(*args: Any, **pcl: Any) -> Config:
        config = usual(*args, **pcl)
        train = dataclasses.replace(config.train, mixup=0.4, label_smoothing=0.1)
        return dataclasses.replace(config, train=train)

    def cut(loader: TrainLoader, *inputs: Any, **options: Any) -> Feed:
        assert isinstance(loader, ResidentTrainLoader)
        loader.options = dataclasses.replace(loader.options, colours=ColourRule.of(0.3))
        around = with_cutout(loader, 3, 1, CUDA)
        assert isinstance(around, DeviceLoader)
        return make_feed(around, *inputs, **options)

    monkeypatch.setattr(test_fake_cuda, "tiny_config", changed)
    monkeypatch.setattr(test_fake_cuda, "make_feed", cut)


@pytest.mark.usefixtures("fake_cuda", "regularised")
@pytest.mark.parametrize("method", ["pcl", "vanilla", "one", "kdcl"])
def test_all_of_a_step_stays_on_the_device(method: str) -> None:
    step = make_step(method=method)
    assert step.state.regularise is not None
    strays: list[str] = []
    assert find_obstacle(lambda: strays.extend(strays_of(step))) is None
    assert strays == []
