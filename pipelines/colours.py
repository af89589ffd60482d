"""Colour jitter and random grayscale: how strong for each view, and the plain way to apply it.

As torchvision's `ColorJitter` (without hue) and `RandomGrayscale`, drawn from (seed, epoch, sample, view)
alone with the generator of the boxes: draw 11 has the words of brightness, contrast, saturation and
their order; draw 10, after the flip's word, that of gray. Factors are multiples of 2^-22 made of integers, so
they are the same bits on every device.
"""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from pcl_fast.errors import ConfigError
from pcl_fast.philox import Stream, below_torch, philox_torch
from pipelines.boxes import FLIP_DRAW, Boxes

COLOUR_DRAW = FLIP_DRAW + 1
BITS = 22
ORDERS = ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))  # as `_in_order` makes them
LUMA = (0.2989, 0.587, 0.114)
WHITE = 255.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ColourRule:
    """Factors are uniform in [1 - x, 1 + x], each x from 0 to 1; `grayscale` is a probability.

    Raises:
        ConfigError: for a number outside [0, 1].
    """

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    grayscale: float = 0.0

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} {getattr(self, name)} is no strength of jitter: give 0 to 1")

    @classmethod
    def of(cls, strength: float) -> "ColourRule | None":
        """Torchvision's `ColorJitter(strength, strength, strength)`; None for 0."""
        if strength == 0:
            return None
        return cls(brightness=strength, contrast=strength, saturation=strength)

    @property
    def whole(self) -> tuple[tuple[int, int, int], int]:
        """The strengths of the factors in multiples of 2^-22, and the words below which a view is gray."""
        strengths = (self.brightness, self.contrast, self.saturation)
        brightness, contrast, saturation = (round(strength * (1 << BITS)) for strength in strengths)
        return (brightness, contrast, saturation), round(self.grayscale * (1 << 32))


def draw_colours(
    sample_ids_B: Tensor, num_views: int, seed: int, epoch: int | Tensor, rule: ColourRule
) -> Tensor:
    """Float32 `[V, B, 5]`: factors of brightness, contrast, saturation, number of their order, 1 for gray.

    `epoch` may be a tensor on the samples' device; nothing synchronises.
    """
    views_V1 = torch.arange(num_views, device=sample_ids_B.device).unsqueeze(1)
    counter = (epoch, sample_ids_B, views_V1)
    *words, order = philox_torch((seed, Stream.AUGMENT), *counter, COLOUR_DRAW)
    _, gray, _, _ = philox_torch((seed, Stream.AUGMENT), *counter, FLIP_DRAW)
    strengths, gray_below = rule.whole
    factors = [
        ((1 << BITS) - strength + ((word * (2 * strength)) >> 32)).to(torch.float32) * 2.0**-BITS
        for word, strength in zip(words, strengths, strict=True)
    ]
    which = (below_torch(order, len(ORDERS)), gray < gray_below)
    return torch.stack([*factors, *(number.to(torch.float32) for number in which)], -1)


def with_colours(
    boxes: Boxes[Tensor], sample_ids_B: Tensor, seed: int, epoch: int, rule: ColourRule | None
) -> Boxes[Tensor]:
    """The boxes with what `draw_colours` draws for their views; as they are without a rule."""
    if rule is None:
        return boxes
    colours_VB5 = draw_colours(sample_ids_B, len(boxes.flip_VB), seed, epoch, rule)
    return dataclasses.replace(boxes, colours_VB5=colours_VB5)


def jittered(
    pixels: Tensor,
    sample_ids_B: Tensor,
    num_views: int,
    seed: int,
    epoch: int | Tensor,
    rule: ColourRule | None,
) -> Tensor:
    """Views [V * B, C, H, W] of pixels from 0 to 255, in float32 with a rule, and as they are without."""
    if rule is None:
        return pixels
    colours_VB5 = draw_colours(sample_ids_B, num_views, seed, epoch, rule)
    return apply_colours(pixels.unflatten(0, (num_views, -1)).float(), colours_VB5).flatten(0, 1)


def apply_colours(views_VBCSS: Tensor, colours_VB5: Tensor) -> Tensor:
    """Jitter views whose pixels are from 0 to 255, each operation's result clamped to that."""
    order_VB, gray_VB = colours_VB5[..., 3].long(), colours_VB5[..., 4] > 0
    orders_VB3 = _in_order(order_VB)
    factors_VB3 = colours_VB5[..., :3].to(views_VBCSS.dtype)
    for slot in range(3):
        which_VB = orders_VB3[..., slot]
        luma = _luma(views_VBCSS)
        mean = luma.mean((-1, -2), keepdim=True)
        which = _over_pixels(which_VB)
        anchor = torch.where(which == 0, 0.0, torch.where(which == 1, mean, luma))
        factor = _over_pixels(factors_VB3.gather(-1, which_VB.unsqueeze(-1)).squeeze(-1))
        views_VBCSS = (anchor + factor * (views_VBCSS - anchor)).clamp(0, WHITE)
    return torch.where(_over_pixels(gray_VB), _luma(views_VBCSS).clamp(0, WHITE), views_VBCSS)


def _in_order(order_VB: Tensor) -> Tensor:
    """`ORDERS` by number, [V, B, 3], computed: a table on the host would have to be fetched."""
    first_VB, swapped_VB = order_VB // 2, order_VB % 2 > 0
    least_VB, most_VB = (first_VB == 0).long(), 2 - (first_VB == 2).long()
    second_VB = torch.where(swapped_VB, most_VB, least_VB)
    return torch.stack([first_VB, second_VB, 3 - first_VB - second_VB], -1)


def _luma(views_VBCSS: Tensor) -> Tensor:
    red, green, blue = views_VBCSS.unbind(-3)
    return (LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue).unsqueeze(-3)


def _over_pixels(values_VB: Tensor) -> Tensor:
    return values_VB[..., None, None, None]
