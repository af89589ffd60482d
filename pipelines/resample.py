"""Views in plain torch: every weight written out. What the kernels are tested against, and do without.

Place i of n along a side that is resized from h pixels is the mean of these, pixel j weighted by
max(0, 1 - |(j + 1/2) - (i + 1/2) h / n| / max(1, h / n)): a triangle filter, widened where the image is made
smaller. Multiplied by 2 max(n, h) those weights are integers. The pixels outside the box weigh nothing.
"""

import torch
from torch import Tensor

from pipelines.boxes import Boxes
from pipelines.colours import apply_colours
from pipelines.view_spec import COLOURS, ViewSpec


def reference_views(
    images_BHWC: Tensor, boxes: Boxes[Tensor], spec: ViewSpec, colours_VB5: Tensor | None = None
) -> Tensor:
    """The views `[V, B, C, S, S]` of uint8 images `[B, H, W, 3]`, of which each may fill a part."""
    raw_VBCSS = resample(images_BHWC, boxes, spec.size)
    if colours_VB5 is not None:
        raw_VBCSS = apply_colours(raw_VBCSS, colours_VB5)
    scale, shift = (raw_VBCSS.new_tensor(numbers).view(3, 1, 1) for numbers in spec.scale_and_shift)
    views, batch = raw_VBCSS.shape[:2]
    out = spec.empty(views, batch, raw_VBCSS.device).zero_()
    out[:, :, :COLOURS] = raw_VBCSS * scale + shift
    return out


def resample(
    images_BHWC: Tensor, boxes: Boxes[Tensor], size: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The pixels of the views, `[V, B, 3, size, size]`, from 0 to 255 and not rounded."""
    pixels_BCHW = images_BHWC.permute(0, 3, 1, 2).to(dtype)
    grids_VB4 = boxes.grids_VB4
    if grids_VB4 is None:
        grids_VB4 = torch.zeros_like(boxes.boxes_VB4)
        grids_VB4[..., :2] = size
    views: list[Tensor] = []
    for boxes_B4, flip_B, grids_B4 in zip(boxes.boxes_VB4, boxes.flip_VB, grids_VB4, strict=True):
        rows_BSH, columns_BSW = (
            _weights(boxes_B4[:, axis::2], grids_B4[:, axis::2], size, extent, dtype)
            for axis, extent in enumerate(pixels_BCHW.shape[2:])
        )
        columns_BSW = torch.where(flip_B[:, None, None], columns_BSW.flip(1), columns_BSW)
        views.append(rows_BSH.unsqueeze(1) @ pixels_BCHW @ columns_BSW.mT.unsqueeze(1))
    return torch.stack(views)


def _weights(box_B2: Tensor, grid_B2: Tensor, size: int, extent: int, dtype: torch.dtype) -> Tensor:
    """`[B, size, extent]`: what each pixel of a side weighs at each place.

    `box_B2`: its first pixel and the number of them. `grid_B2`: the number of places, and the first one.
    """
    (first, side), (cells, offset) = (numbers.view(-1, 2, 1, 1).unbind(1) for numbers in (box_B2, grid_B2))
    place = offset + torch.arange(size, device=box_B2.device).unsqueeze(1)
    pixel = torch.arange(extent, device=box_B2.device) - first
    distance = ((2 * pixel + 1) * cells - (2 * place + 1) * side).abs()
    weight = (2 * torch.maximum(side, cells) - distance).clamp(min=0) * ((pixel >= 0) & (pixel < side))
    return weight.to(dtype) / weight.sum(-1, keepdim=True).to(dtype)
