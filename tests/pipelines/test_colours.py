"""Colour jitter against torchvision's operations, and the distribution of what is drawn."""

import math

import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from pcl_fast.errors import ConfigError
from pipelines.colours import ORDERS, ColourRule, apply_colours, draw_colours

STRONG = ColourRule(brightness=0.4, contrast=0.8, saturation=1.0, grayscale=0.2)


def by_torchvision(view: Tensor, colours: Tensor) -> Tensor:
    operations = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation)
    view = view / 255
    for which in ORDERS[int(colours[3])]:
        view = operations[which](view, float(colours[which]))
    return (tv.rgb_to_grayscale(view, 3) if colours[4] else view) * 255


def test_they_are_torchvisions_operations_in_their_order() -> None:
    views = 255 * torch.rand(2, 30, 3, 8, 9, generator=torch.Generator().manual_seed(0))
    colours = draw_colours(torch.arange(30), 2, 0, 0, STRONG)
    assert set(colours[..., 3].flatten().tolist()) == set(range(6))
    found = apply_colours(views, colours)
    for view in range(2):
        for place in range(30):
            expected = by_torchvision(views[view, place], colours[view, place])
            torch.testing.assert_close(found[view, place], expected, rtol=0, atol=1e-3)


def test_no_strength_changes_nothing() -> None:
    views = torch.randint(0, 256, (2, 5, 3, 8, 9)).float()
    colours = draw_colours(torch.arange(5), 2, 0, 0, ColourRule())
    assert torch.equal(colours[..., [0, 1, 2, 4]], torch.tensor([1.0, 1.0, 1.0, 0.0]).expand(2, 5, 4))
    torch.testing.assert_close(apply_colours(views, colours), views, rtol=0, atol=1e-4)


def test_factors_are_uniform_orders_even_and_gray_as_often_as_asked() -> None:
    drawn = draw_colours(torch.arange(20_000), 2, 0, 0, STRONG).double()
    for which, strength in enumerate((0.4, 0.8, 1.0)):
        ranks = ((drawn[..., which].flatten() - 1 + strength) / (2 * strength)).sort().values
        even = torch.arange(len(ranks)) / len(ranks)
        assert (ranks - even).abs().max() < 1.95 / math.sqrt(len(ranks))  # Kolmogorov and Smirnov
    orders = drawn[..., 3].long().flatten().bincount(minlength=6)
    assert ((orders - 40_000 / 6) ** 2 / (40_000 / 6)).sum() < 5 + 5 * math.sqrt(10)
    assert abs(drawn[..., 4].mean() - 0.2) < 5 * 0.4 / math.sqrt(40_000)
    correlation = torch.corrcoef(drawn.flatten(0, 1).T).triu(1).abs().max()
    assert correlation < 5 / math.sqrt(40_000)


def test_colours_depend_on_seed_epoch_sample_and_view_alone() -> None:
    samples = torch.tensor([5, 2**31 - 1, 77])
    together = draw_colours(samples, 3, 9, 4, STRONG)
    assert torch.equal(draw_colours(samples[2:], 2, 9, torch.tensor(4), STRONG), together[:2, 2:])
    for other in (draw_colours(samples, 3, 8, 4, STRONG), draw_colours(samples, 3, 9, 5, STRONG)):
        assert (other[..., :3] != together[..., :3]).all()


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "grayscale"])
def test_strengths_that_are_none(name: str) -> None:
    for value in (-0.1, 1.1):
        with pytest.raises(ConfigError, match=f"{name} {value}"):
            ColourRule(**{name: value})
