"""Every view of a batch in one launch, in Triton: crop, resize, mirror, jitter, normalise.

A program makes a tile of one view. It reads each pixel of the box that a place needs (from a cache: its
neighbours need it, too) and weighs it as resample.py says, in the same integers; nothing but the views is
written. Contrast needs the mean of a view: then a launch that stores one sum a tile comes first. Nothing
synchronises, and the host knows all shapes, so this can be captured in a CUDA graph.
"""
# Kernels take pointers and strides, which have no types and are many.
# pyright: basic, reportGeneralTypeIssues=false, reportCallIssue=false
# ruff: noqa: PLR0913, PLR0917

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipelines.boxes import Boxes
from pipelines.colours import LUMA, WHITE
from pipelines.view_spec import COLOURS, ViewSpec

BLOCK_ROWS, BLOCK_COLUMNS = 16, 32
_RED, _GREEN, _BLUE = (tl.constexpr(part) for part in LUMA)
_WHITE, _COLOURS = tl.constexpr(WHITE), tl.constexpr(COLOURS)


def make_views_triton(
    images_BHWC: Tensor, boxes: Boxes[Tensor], spec: ViewSpec, out: Tensor, colours_VB5: Tensor | None = None
) -> None:
    """Fill `out`, made by `spec.empty`, with the views of uint8 images `[B, H, W, 3]`, all on one device."""
    assert spec.takes(out), (out.dtype, out.shape, out.stride())
    image_stride, row_stride, *dense = images_BHWC.stride()
    assert images_BHWC.dtype == torch.uint8, images_BHWC.dtype
    assert dense == [COLOURS, 1], images_BHWC.stride()
    views, batch = boxes.flip_VB.shape
    tiles = triton.cdiv(spec.size, BLOCK_ROWS) * triton.cdiv(spec.size, BLOCK_COLUMNS)
    grids_VB4 = None if boxes.grids_VB4 is None else boxes.grids_VB4.contiguous()
    asked = (boxes.boxes_VB4.contiguous(), grids_VB4, boxes.flip_VB.contiguous().view(torch.uint8))
    colours = None if colours_VB5 is None else colours_VB5.contiguous()
    sums = None if colours is None else out.new_empty((views * batch, tiles), dtype=torch.float32)
    scale, shift = spec.scale_and_shift
    sizes = (views, batch, image_stride, row_stride, *out.stride()[1:])
    for only_sums in (False,) if colours is None else (True, False):
        _make_tile[(views * batch * tiles,)](
            images_BHWC, *asked, colours, sums, out, *sizes, *scale, *shift,
            SIZE=spec.size, CHANNELS=spec.channels, TILES=tiles, ALL_TILES=triton.next_power_of_2(tiles),
            ROWS=BLOCK_ROWS, COLUMNS=BLOCK_COLUMNS, ONLY_SUMS=only_sums, enable_fp_fusion=True,
        )  # fmt: skip


@triton.jit
def _make_tile(
    pixels, boxes, grids, flips, colours, sums, out,
    views, batch, image_stride, row_stride, out_image, out_channel, out_row, out_column,
    red_scale, green_scale, blue_scale, red_shift, green_shift, blue_shift,
    SIZE: tl.constexpr, CHANNELS: tl.constexpr, TILES: tl.constexpr, ALL_TILES: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, ONLY_SUMS: tl.constexpr,
):  # fmt: skip
    """One tile of one view; with ONLY_SUMS, the sum of its luma where contrast is to be changed."""
    program = tl.program_id(0)
    tile, view, image = program % TILES, program // TILES % views, program // TILES // views
    place = (view * batch + image).to(tl.int64)
    across: tl.constexpr = (SIZE + COLUMNS - 1) // COLUMNS
    row = tile // across * ROWS + tl.arange(0, ROWS)
    column = tile % across * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < SIZE)[:, None] & (column < SIZE)[None, :]
    red, green, blue = _resample(
        pixels + image.to(tl.int64) * image_stride, row_stride, boxes + place * 4,
        grids + place * 4 if grids is not None else None, tl.load(flips + place), row, column, SIZE,
    )  # fmt: skip
    if colours is not None:
        mean = 0.0
        if not ONLY_SUMS:
            tiles = tl.arange(0, ALL_TILES)
            mean = tl.sum(tl.load(sums + place * TILES + tiles, mask=tiles < TILES, other=0.0)) / (
                SIZE * SIZE
            )
        red, green, blue = _jitter(red, green, blue, colours + place * 5, mean, ONLY_SUMS)
    if ONLY_SUMS:
        tl.store(sums + place * TILES + tile, tl.sum(tl.where(inside, _luma(red, green, blue), 0.0)))
    else:
        at = out + place * out_image + row[:, None] * out_row + column[None, :] * out_column
        _store(at, red * red_scale + red_shift, inside)
        _store(at + out_channel, green * green_scale + green_shift, inside)
        _store(at + 2 * out_channel, blue * blue_scale + blue_shift, inside)
        for channel in tl.static_range(_COLOURS, CHANNELS):
            _store(at + channel * out_channel, red * 0.0, inside)


@triton.jit
def _store(at, values, inside):
    tl.store(at, values.to(at.dtype.element_ty), mask=inside)


@triton.jit
def _resample(image, row_stride, box, grid, flip, row, column, SIZE: tl.constexpr):
    """The colours of a view at these rows and columns, from 0 to 255; see resample.py."""
    top, left, height, width = tl.load(box), tl.load(box + 1), tl.load(box + 2), tl.load(box + 3)
    rows, columns = top * 0 + SIZE, top * 0 + SIZE
    row, column = tl.minimum(row, SIZE - 1).to(tl.int64), tl.minimum(column, SIZE - 1).to(tl.int64)
    if flip != 0:
        column = SIZE - 1 - column
    if grid is not None:
        rows, columns = tl.load(grid), tl.load(grid + 1)
        row, column = row + tl.load(grid + 2), column + tl.load(grid + 3)
    first_row, row_taps = _taps(row, height, rows)
    first_column, column_taps = _taps(column, width, columns)
    row_scale = _sum_weights(row, first_row, row_taps, height, rows)
    column_scale = _sum_weights(column, first_column, column_taps, width, columns)
    red = tl.zeros([row.shape[0], column.shape[0]], tl.float32)
    green, blue = red, red
    for row_tap in range(row_taps):
        y = first_row + row_tap
        row_weight = _weight(y, row, height, rows) / row_scale
        line = image + (top + tl.minimum(y, height - 1)) * row_stride
        for column_tap in range(column_taps):
            x = first_column + column_tap
            column_weight = _weight(x, column, width, columns) / column_scale
            weight = row_weight[:, None] * column_weight[None, :]
            at = line[:, None] + ((left + tl.minimum(x, width - 1)) * 3)[None, :]
            red += weight * tl.load(at).to(tl.float32)
            green += weight * tl.load(at + 1).to(tl.float32)
            blue += weight * tl.load(at + 2).to(tl.float32)
    return red, green, blue


@triton.jit
def _taps(place, side, cells):
    """The first pixel that places look at, and how many they do at most."""
    widest = tl.maximum(side, cells)
    first = tl.maximum((2 * place + 1) * side - 2 * widest + cells, 0) // (2 * cells)
    return first, ((2 * widest + cells - 1) // cells).to(tl.int32)


@triton.jit
def _weight(pixel, place, side, cells):
    """What a pixel weighs at a place, times an integer; zero for those beyond the side."""
    weight = 2 * tl.maximum(side, cells) - tl.abs((2 * pixel + 1) * cells - (2 * place + 1) * side)
    return tl.where(pixel < side, tl.maximum(weight, 0), 0).to(tl.float32)


@triton.jit
def _sum_weights(place, first, taps, side, cells):
    total = tl.zeros([place.shape[0]], tl.float32)
    for tap in range(taps):
        total += _weight(first + tap, place, side, cells)
    return total


@triton.jit
def _luma(red, green, blue):
    return _RED * red + _GREEN * green + _BLUE * blue


@triton.jit
def _clamp(value):
    return tl.minimum(tl.maximum(value, 0.0), _WHITE)


@triton.jit
def _jitter(red, green, blue, colours, mean, BEFORE_CONTRAST: tl.constexpr):
    """The three factors in their order, then perhaps gray; or only what comes before contrast."""
    order = tl.load(colours + 3).to(tl.int32)
    # The orders are sorted: their first two of three, then the rest rising, then falling.
    first = order // 2
    lower = tl.where(first == 0, 1, 0)
    second = tl.where(order % 2 == 0, lower, 3 - first - lower)
    going = first >= 0
    for slot in tl.static_range(3):
        which = first if slot == 0 else (second if slot == 1 else 3 - first - second)
        if BEFORE_CONTRAST:
            going = going & (which != 1)
        luma = _luma(red, green, blue)
        anchor = tl.where(which == 0, 0.0, tl.where(which == 1, mean, luma))
        factor = tl.where(going, tl.load(colours + which), 1.0)
        red, green, blue = (
            _blend(red, anchor, factor),
            _blend(green, anchor, factor),
            _blend(blue, anchor, factor),
        )
    if not BEFORE_CONTRAST:
        gray, luma = tl.load(colours + 4) > 0, _clamp(_luma(red, green, blue))
        red, green = tl.where(gray, luma, red), tl.where(gray, luma, green)
        blue = tl.where(gray, luma, blue)
    return red, green, blue


@triton.jit
def _blend(value, anchor, factor):
    return _clamp(anchor + factor * (value - anchor))
