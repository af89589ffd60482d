"""Colour jitter in every loader, against torchvision's operations on the views without it."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from pcl_fast.contract import DeviceLoader, TrainLoader
from pcl_fast.errors import ConfigError
from pcl_fast.step.obstacles import find_obstacle
from pipelines.colours import ORDERS, ColourRule, _in_order, draw_colours
from pipelines.resident import ResidentTrainLoader
from tests.pipelines.any_loader import COMMON, DECODERS, VIEWS, open_loader, write_photos
from tests.pipelines.test_colours import by_torchvision

RULE = ColourRule.of(0.4)
EPOCH = 2
NAMES = ("resident", *(name for name in DECODERS if name != "dali's crops"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos"))


def in_gray_levels(views_VCHW: Tensor) -> Tensor:
    mean, std = (
        torch.tensor(of_channels).view(3, 1, 1)
        for of_channels in (COMMON["normalisation"].mean, COMMON["normalisation"].std)
    )
    return (views_VCHW.float() * std + mean) * 255


def by_sample(loader: TrainLoader, first_step: int = 0) -> dict[int, Tensor]:
    return {
        sample: in_gray_levels(batch.views_VBCHW[:, place])
        for batch in loader.epoch(EPOCH, first_step)
        for place, sample in enumerate(batch.sample_ids_B.tolist())
    }


@pytest.mark.parametrize("name", NAMES)
def test_views_are_torchvisions_of_the_views_without_it(name: str, photos: Path) -> None:
    plain = by_sample(open_loader(name, photos))
    found = by_sample(open_loader(name, photos, colours=RULE))
    assert RULE is not None
    assert len(found) == len(plain) > 20
    for sample, views in found.items():
        colours = draw_colours(torch.tensor([sample]), VIEWS, COMMON["seed"], EPOCH, RULE)[:, 0]
        for view, colour, before in zip(views, colours, plain[sample], strict=True):
            torch.testing.assert_close(view, by_torchvision(before, colour), rtol=0, atol=0.02)
        assert (views - plain[sample]).abs().max() > 1


@pytest.mark.parametrize("name", NAMES)
def test_the_step_an_epoch_is_resumed_at_changes_no_pixel(name: str, photos: Path) -> None:
    loader = open_loader(name, photos, colours=RULE)
    whole = by_sample(loader)
    for sample, views in by_sample(loader, first_step=3).items():
        assert torch.equal(views, whole[sample])


def test_dalis_own_crops_have_none(photos: Path) -> None:
    with pytest.raises(ConfigError, match=r"--data.crops library: DALI's own crops have no colour jitter"):
        open_loader("dali's crops", photos, colours=RULE)


def test_a_resident_data_set_is_jittered_on_the_device_alone(photos: Path) -> None:
    loader = open_loader("resident", photos, colours=RULE, drop_last=True)
    assert isinstance(loader, ResidentTrainLoader)
    assert isinstance(loader, DeviceLoader)
    for epoch, first in ((0, 0), (3, 2)):
        loader.begin(epoch, first)
        for batch in loader.epoch(epoch, first):
            assert torch.equal(loader.take().views_VBCHW, batch.views_VBCHW)
    loader.begin(0)
    assert find_obstacle(loader.take) is None


def test_a_strength_is_that_of_all_three() -> None:
    assert ColourRule.of(0) is None
    assert RULE is not None
    assert (RULE.brightness, RULE.contrast, RULE.saturation, RULE.grayscale) == (0.4, 0.4, 0.4, 0)
    with pytest.raises(ConfigError, match="give 0 to 1"):
        ColourRule.of(1.5)


def test_orders_are_computed_as_they_are_listed() -> None:
    assert _in_order(torch.arange(6)[None])[0].tolist() == [list(order) for order in ORDERS]
