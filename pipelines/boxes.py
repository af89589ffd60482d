"""Which part of an image a view shows: random resized crops for training, centre crops for evaluation.

The random crops are torchvision's `RandomResizedCrop` and `RandomHorizontalFlip`, drawn from (seed,
epoch, sample, view) alone: philox's key is (seed, Stream.AUGMENT), its counter (epoch, sample, view,
draw). Draw 0 to 9 are the ten attempts (words: share of the area, ratio, top, left), draw 10 is the
flip. Numpy, torch and Triton (boxes_triton.py) give the same bits, because nothing is computed but
integers and float64 products and square roots, which are correctly rounded everywhere, and no product
is ever added to anything, so that there is nothing a compiler could fuse.

Shares and logarithms of ratios are multiples of 2^-28, and their exponential, a Taylor polynomial in
integers, is right to 1e-7 (1e-5 for ratios near 8). A side differs from that of real numbers only
where it would be rounded the other way by so little: about one crop in 20,000, by one pixel.
"""

import math
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pcl_fast.errors import ConfigError
from pcl_fast.philox import Stream, philox_numpy, philox_torch

ATTEMPTS = 10
FLIP_DRAW = ATTEMPTS
BITS = 28
ONE = 1 << BITS
HALF_WORD = 1 << 31
EXP_TERMS = tuple(round(ONE / math.factorial(power)) for power in range(13))
WIDEST_RATIO = 8
LONGEST_SIDE = (1 << 16) - 1

Array = TypeVar("Array", Tensor, NDArray[Any])


@dataclass(frozen=True, slots=True)
class Boxes(Generic[Array]):
    """Where the views of a batch lie in their images.

    `boxes_VB4` int64: top, left, height, width, in pixels of the image; a view is made of the pixels
    inside alone. `flip_VB` bool: whether the view is mirrored. `grids_VB4` int64: rows and columns that
    the box is resized to, and the first row and column of them that the view shows; None if the view
    shows all. `colours_VB5` float32: how colours are jittered (colours.py); None if they are not.
    """

    boxes_VB4: Array
    flip_VB: Array
    grids_VB4: Array | None = None
    colours_VB5: Array | None = None


@dataclass(frozen=True, slots=True)
class CropRule:
    """What share of the image's area a crop covers, and its ratio of width to height, log-uniformly.

    Raises:
        ConfigError: for bounds that are not in order, or ratios outside [1/8, 8].
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    def __post_init__(self) -> None:
        (least, most), (narrow, wide) = self.scale, self.ratio
        if not 0 < least <= most <= 1:
            raise ConfigError(f"crops cannot cover {self.scale} of an image: give rising shares, 0 to 1")
        if not 1 / WIDEST_RATIO <= narrow <= wide <= WIDEST_RATIO:
            raise ConfigError(f"crops cannot have ratios {self.ratio}: give rising numbers, 1/8 to 8")

    @property
    def whole(self) -> tuple[int, int, int, int, int, int, int]:
        """Least share, span; least logarithm, span; ratio bounds; 1 / the least: multiples of 2^-28."""
        low, high = (round(math.log(bound) * ONE) for bound in self.ratio)
        least, most = (round(share * ONE) for share in self.scale)
        bounds = (round(self.ratio[0] * ONE), round(self.ratio[1] * ONE), round(ONE / self.ratio[0]))
        return least, most - least, low, high - low, *bounds


IMAGENET_CROPS = CropRule()


def draw_boxes(
    sizes_B2: Tensor,
    sample_ids_B: Tensor,
    num_views: int,
    seed: int,
    epoch: int | Tensor,
    rule: CropRule = IMAGENET_CROPS,
) -> Boxes[Tensor]:
    """Draw every view of the samples, on the device of their int64 sizes (height, width; at most 65535).

    `epoch` may be a tensor on that device; nothing synchronises.
    """
    views_V1 = torch.arange(num_views, device=sizes_B2.device).unsqueeze(1)
    draws_D11 = torch.arange(ATTEMPTS + 1, device=sizes_B2.device).view(-1, 1, 1)
    words = philox_torch((seed, Stream.AUGMENT), epoch, sample_ids_B, views_V1, draws_D11)
    return _choose(torch, words, sizes_B2, rule)


def draw_boxes_numpy(
    sizes_B2: NDArray[np.int64],
    sample_ids_B: NDArray[np.int64],
    num_views: int,
    seed: int,
    epoch: int,
    rule: CropRule = IMAGENET_CROPS,
) -> Boxes[NDArray[Any]]:
    """The boxes of `draw_boxes` as numpy arrays."""
    views_V1, draws_D11 = np.arange(num_views)[:, None], np.arange(ATTEMPTS + 1)[:, None, None]
    words = philox_numpy((seed, Stream.AUGMENT), epoch, sample_ids_B, views_V1, draws_D11)
    return _choose(np, [word.astype(np.int64) for word in words], sizes_B2, rule)


def centre_boxes(sizes_B2: Tensor, size: int, resize: int) -> Boxes[Tensor]:
    """One view of each image: the shorter side resized to `resize`, then `size` x `size` from the centre.

    As by torchvision's `Resize(resize)` and `CenterCrop(size)`, for `size <= resize`.
    """
    return _centre(torch, sizes_B2, size, resize)


def centre_boxes_numpy(sizes_B2: NDArray[np.int64], size: int, resize: int) -> Boxes[NDArray[Any]]:
    """The boxes of `centre_boxes` as numpy arrays."""
    return _centre(np, sizes_B2, size, resize)


def _choose(xp: Any, words: Any, sizes_B2: Any, rule: CropRule) -> Boxes[Any]:
    """The first attempt that fits, or else the fallback; `words` are int64 [D, V, B], the flip's last."""
    flip_VB = words[0][FLIP_DRAW] < HALF_WORD
    share, ratio, top, left = (word[:ATTEMPTS] for word in words)
    height_B, width_B = sizes_B2[:, 0], sizes_B2[:, 1]
    least, share_span, low, log_span, *_ = rule.whole
    area_AVB = height_B * width_B * (least + ((share * share_span) >> 32))
    log_AVB = low + ((ratio * log_span) >> 32)
    heights_AVB, widths_AVB = _side(xp, area_AVB, -log_AVB), _side(xp, area_AVB, log_AVB)
    tops_AVB = (top * (height_B - heights_AVB + 1)) >> 32
    lefts_AVB = (left * (width_B - widths_AVB + 1)) >> 32
    fits_AVB = (heights_AVB > 0) & (heights_AVB <= height_B) & (widths_AVB > 0) & (widths_AVB <= width_B)
    box = _fallback(xp, height_B, width_B, rule)
    for attempt in reversed(range(ATTEMPTS)):
        drawn = (tops_AVB[attempt], lefts_AVB[attempt], heights_AVB[attempt], widths_AVB[attempt])
        box = [xp.where(fits_AVB[attempt], new, old) for new, old in zip(drawn, box, strict=True)]
    return Boxes(xp.stack(box, -1), flip_VB)


def _side(xp: Any, area: Any, log_ratio: Any) -> Any:
    """round(sqrt(area * exp(log_ratio))), both in multiples of 2^-28."""
    power = EXP_TERMS[-1]
    for term in reversed(EXP_TERMS[:-1]):
        power = term + ((power * log_ratio) >> BITS)
    square = xp.asarray(area, dtype=xp.float64) * xp.asarray(power, dtype=xp.float64)
    return xp.asarray(xp.floor(xp.sqrt(square * 2.0 ** (-2 * BITS)) + 0.5), dtype=xp.int64)


def _fallback(xp: Any, height_B: Any, width_B: Any, rule: CropRule) -> list[Any]:
    """The greatest central crop whose ratio is within the bounds."""
    *_, narrowest, widest, inverse = rule.whole
    too_narrow = (width_B << BITS) < height_B * narrowest
    too_wide = (width_B << BITS) > height_B * widest
    one_B = xp.ones_like(height_B)
    lower = xp.minimum(xp.maximum((width_B * inverse + ONE // 2) >> BITS, one_B), height_B)
    slimmer = xp.minimum(xp.maximum((height_B * widest + ONE // 2) >> BITS, one_B), width_B)
    height, width = xp.where(too_narrow, lower, height_B), xp.where(too_wide, slimmer, width_B)
    return [(height_B - height) >> 1, (width_B - width) >> 1, height, width]


def _centre(xp: Any, sizes_B2: Any, size: int, resize: int) -> Boxes[Any]:
    assert 0 < size <= resize, (size, resize)
    height_B, width_B = sizes_B2[:, 0], sizes_B2[:, 1]
    short_B, zero_B = xp.minimum(height_B, width_B), xp.zeros_like(height_B)
    rows_B, columns_B = resize * height_B // short_B, resize * width_B // short_B
    tops_B, lefts_B = (_half_to_even(side_B - size) for side_B in (rows_B, columns_B))
    boxes_B4 = xp.stack([zero_B, zero_B, height_B, width_B], -1)
    return Boxes(boxes_B4[None], (zero_B > 0)[None], xp.stack([rows_B, columns_B, tops_B, lefts_B], -1)[None])


def _half_to_even(number: Any) -> Any:
    """round(number / 2) as Python rounds."""
    half = number >> 1
    return half + (number & half & 1)
