"""A batch of a resident data set in one launch, in Triton: looked up, cropped, flipped, normalised.

A program makes one view: a crop is a run of bytes of the table (cifar_views.py), `width` of each row kept.
The step, of which batch it is, is read on the device, so this can be captured in a CUDA graph.
"""
# Kernels take pointers, which have no types and are many.
# pyright: basic, reportGeneralTypeIssues=false, reportCallIssue=false, reportAttributeAccessIssue=false
# ruff: noqa: PLR0913, PLR0917

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipelines.normalisation import Normalisation

CHANNELS = tl.constexpr(3)
BLOCK = 1024


class Place(NamedTuple):
    """Where a batch is in its epoch and a crop in the table.

    `step` int64 [], the number of the batch (0-based); `size` (height, width) of a view; `row`, pixels from
    one row of a crop to the next.
    """

    step: Tensor
    batch_size: int
    size: tuple[int, int]
    row: int


def take_triton(
    pixels: Tensor,
    laid: tuple[Tensor, Tensor, Tensor],
    place: Place,
    normalisation: Normalisation,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Views `[V, B, 3, H, W]`, each channels-last, of type `dtype`; labels and sample ids int64 `[B]`.

    `pixels` uint8 `[P, 3]` is the table; `laid` the epoch: samples `[N]`, where each of their views begins
    `[V, N, 1]`, labels `[N]`, all int64.
    """
    order_N, starts_VNP, labels_N = laid
    assert starts_VNP.shape[2] == 1, "channels-last images are one plane"
    views, count = starts_VNP.shape[:2]
    (height, width), batch = place.size, place.batch_size
    out = torch.empty(views * batch, height, width, 3, dtype=dtype, device=pixels.device)
    labels_B, ids_B = torch.empty(2, batch, dtype=torch.int64, device=pixels.device).unbind()
    _take[(views * batch,)](
        pixels, order_N, starts_VNP.contiguous(), labels_N, place.step, out, labels_B, ids_B,
        batch, count, place.row * 3, *normalisation.mean, *normalisation.std,
        LINE=width * 3, LENGTH=height * width * 3, BLOCK=BLOCK, enable_fp_fusion=False,
    )  # fmt: skip
    return out.permute(0, 3, 1, 2).unflatten(0, (views, batch)), labels_B, ids_B


@triton.jit
def _take(
    pixels, order, starts, labels, step, out, labels_out, ids_out,
    batch, count, row_bytes, mean0, mean1, mean2, std0, std1, std2,
    LINE: tl.constexpr, LENGTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One view of one sample of the batch."""
    program = tl.program_id(0)
    view, place = program // batch, program % batch
    sample = tl.load(step) * batch + place
    if view == 0:
        tl.store(labels_out + place, tl.load(labels + sample))
        tl.store(ids_out + place, tl.load(order + sample))
    crop = pixels + tl.load(starts + view.to(tl.int64) * count + sample) * CHANNELS
    to = out + program.to(tl.int64) * LENGTH
    for begin in range(0, LENGTH, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        inside, channel = at < LENGTH, at % CHANNELS
        value = tl.load(crop + at // LINE * row_bytes + at % LINE, mask=inside, other=0).to(tl.float32)
        mean = tl.where(channel == 0, mean0, tl.where(channel == 1, mean1, mean2))
        std = tl.where(channel == 0, std0, tl.where(channel == 1, std1, std2))
        # As torchvision and the plain way: divided, not multiplied by inverses, each rounded correctly.
        value = tl.div_rn(tl.div_rn(value, 255.0) - mean, std)
        tl.store(to + at, value.to(to.dtype.element_ty), mask=inside)
