"""The views of a batch of decoded images, by whatever is fastest where they lie."""

import torch
from torch import Tensor

from pipelines import views_cpu
from pipelines.boxes import Boxes
from pipelines.normalisation import NORMALISATIONS, Normalisation
from pipelines.resample import reference_views
from pipelines.view_spec import ViewSpec

__all__ = ["NORMALISATIONS", "Normalisation", "make_views"]


def make_views(
    images_BHWC: Tensor,
    boxes: Boxes[Tensor],
    spec: ViewSpec,
    colours_VB5: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Crop, resize, mirror, jitter and normalise: views `[V, B, C, S, S]` of decoded images, in one go.

    `images_BHWC` is uint8, dense or a part of something dense; images smaller than it fill its upper left.
    Everything is on one device. `out`, made by `spec.empty`, takes the views; otherwise they get memory of
    their own. On a CPU as many threads are used as torch has, and their number changes nothing.
    """
    if out is None:
        out = spec.empty(*boxes.flip_VB.shape, images_BHWC.device)
    if images_BHWC.device.type == "cpu" and views_cpu.why_unavailable() is None:
        job = views_cpu.Job(boxes, spec, out, colours_VB5)
        views_cpu.make_views_cpu(images_BHWC, job, torch.get_num_threads())
        return out
    return out.copy_(reference_views(images_BHWC, boxes, spec, colours_VB5))
