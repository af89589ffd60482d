"""Random resized crops of a batch in one launch, in Triton: the same bits as boxes.py.

Products are not fused with sums here, and float64 products and square roots are correctly rounded.
"""
# Kernels take pointers and numbers, which have no types and are many.
# pyright: basic, reportGeneralTypeIssues=false, reportCallIssue=false
# ruff: noqa: PLR0913, PLR0917

import torch
import triton
import triton.language as tl
from torch import Tensor

from pcl_fast.philox import Stream
from pipelines.boxes import ATTEMPTS, BITS, EXP_TERMS, FLIP_DRAW, HALF_WORD, Boxes, CropRule

BLOCK = 128
_ATTEMPTS, _FLIP_DRAW, _HALF_WORD = (tl.constexpr(number) for number in (ATTEMPTS, FLIP_DRAW, HALF_WORD))
_BITS, _HALF, _UNIT = tl.constexpr(BITS), tl.constexpr(1 << (BITS - 1)), tl.constexpr(2.0 ** (-2 * BITS))
_EXP_TERMS, _LAST_TERM = tl.constexpr(EXP_TERMS), tl.constexpr(len(EXP_TERMS) - 1)


def draw_boxes_triton(
    sizes_B2: Tensor, sample_ids_B: Tensor, num_views: int, seed: int, epoch: int | Tensor, rule: CropRule
) -> Boxes[Tensor]:
    """The boxes of `boxes.draw_boxes`, in one launch."""
    batch, device = len(sizes_B2), sizes_B2.device
    if not isinstance(epoch, Tensor):
        epoch = torch.full((), epoch, dtype=torch.int64, device=device)
    boxes_VB4 = torch.empty((num_views, batch, 4), dtype=torch.int64, device=device)
    flip_VB = torch.empty((num_views, batch), dtype=torch.bool, device=device)
    _draw[(triton.cdiv(num_views * batch, BLOCK),)](
        sizes_B2.contiguous(), sample_ids_B.contiguous(), epoch, boxes_VB4, flip_VB.view(torch.uint8),
        num_views * batch, batch, seed | Stream.AUGMENT << 32, *rule.whole,
        BLOCK=BLOCK, enable_fp_fusion=False,
    )  # fmt: skip
    return Boxes(boxes_VB4, flip_VB)


@triton.jit
def _draw(
    sizes, sample_ids, epoch, boxes, flips, count, batch, key,
    least, share_span, low, log_span, narrowest, widest, inverse, BLOCK: tl.constexpr,
):  # fmt: skip
    """Boxes and flips of BLOCK views: `boxes.draw_boxes`, operation by operation."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    known = at < count
    image = at % batch
    height, width = tl.load(sizes + image * 2), tl.load(sizes + image * 2 + 1)
    c0 = tl.load(epoch + image * 0).to(tl.uint32)
    c1, c2 = tl.load(sample_ids + image).to(tl.uint32), (at // batch).to(tl.uint32)
    box_top, box_left, box_height, box_width = _fallback(height, width, narrowest, widest, inverse)
    for done in range(_ATTEMPTS):
        attempt = (at * 0 + (_ATTEMPTS - 1 - done)).to(tl.uint32)
        share, ratio, top, left = tl.philox(key, c0, c1, c2, attempt)
        area = height * width * (least + ((share.to(tl.int64) * share_span) >> 32))
        log_ratio = low + ((ratio.to(tl.int64) * log_span) >> 32)
        new_height, new_width = _side(area, -log_ratio), _side(area, log_ratio)
        new_top = (top.to(tl.int64) * (height - new_height + 1)) >> 32
        new_left = (left.to(tl.int64) * (width - new_width + 1)) >> 32
        fits = (new_height > 0) & (new_height <= height) & (new_width > 0) & (new_width <= width)
        box_top, box_left = tl.where(fits, new_top, box_top), tl.where(fits, new_left, box_left)
        box_height, box_width = tl.where(fits, new_height, box_height), tl.where(fits, new_width, box_width)
    flip, _, _, _ = tl.philox(key, c0, c1, c2, (at * 0 + _FLIP_DRAW).to(tl.uint32))
    tl.store(boxes + at * 4, box_top, mask=known)
    tl.store(boxes + at * 4 + 1, box_left, mask=known)
    tl.store(boxes + at * 4 + 2, box_height, mask=known)
    tl.store(boxes + at * 4 + 3, box_width, mask=known)
    tl.store(flips + at, (flip.to(tl.int64) < _HALF_WORD).to(tl.uint8), mask=known)


@triton.jit
def _side(area, log_ratio):
    power = log_ratio * 0 + _EXP_TERMS[_LAST_TERM]
    for number in tl.static_range(_LAST_TERM):
        power = _EXP_TERMS[_LAST_TERM - 1 - number] + ((power * log_ratio) >> _BITS)
    square = area.to(tl.float64) * power.to(tl.float64)
    return tl.floor(tl.sqrt(square * _UNIT) + 0.5).to(tl.int64)


@triton.jit
def _fallback(height, width, narrowest, widest, inverse):
    lower = tl.minimum(tl.maximum((width * inverse + _HALF) >> _BITS, 1), height)
    slimmer = tl.minimum(tl.maximum((height * widest + _HALF) >> _BITS, 1), width)
    box_height = tl.where((width << _BITS) < height * narrowest, lower, height)
    box_width = tl.where((width << _BITS) > height * widest, slimmer, width)
    return (height - box_height) >> 1, (width - box_width) >> 1, box_height, box_width
