"""The views of a batch of decoded images, by whatever is fastest where they lie."""

import torch
from torch import Tensor

from pcl_fast.device import has_triton
from pipelines import views_cpu
from pipelines.boxes import IMAGENET_CROPS, Boxes, CropRule, draw_boxes
from pipelines.normalisation import NORMALISATIONS, Normalisation
from pipelines.resample import reference_views
from pipelines.view_spec import ViewSpec

__all__ = ["NORMALISATIONS", "Normalisation", "make_views", "random_boxes"]


def random_boxes(
    sizes_B2: Tensor,
    sample_ids_B: Tensor,
    num_views: int,
    seed: int,
    epoch: int | Tensor,
    rule: CropRule = IMAGENET_CROPS,
) -> Boxes[Tensor]:
    """What `boxes.draw_boxes` draws, on a CUDA device in one launch."""
    if sizes_B2.is_cuda and has_triton():
        from pipelines.boxes_triton import draw_boxes_triton

        return draw_boxes_triton(sizes_B2, sample_ids_B, num_views, seed, epoch, rule)
    return draw_boxes(sizes_B2, sample_ids_B, num_views, seed, epoch, rule)


def make_views(
    images_BHWC: Tensor,
    boxes: Boxes[Tensor],
    spec: ViewSpec,
    colours_VB5: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Crop, resize, mirror, jitter and normalise: views `[V, B, C, S, S]` of decoded images, in one go.

    `images_BHWC` is uint8, each pixel's 3 bytes and each row's pixels adjacent; smaller images fill their
    upper left part. Everything is on one device, and nothing synchronises. `out`, made by `spec.empty`,
    takes the views; otherwise they get memory of their own. On a CPU as many threads are used as torch
    has; their number changes nothing.
    """
    views, batch = boxes.flip_VB.shape
    made = spec.empty(views, batch, images_BHWC.device) if out is None else out
    if images_BHWC.is_cuda and has_triton():
        from pipelines.views_triton import make_views_triton

        make_views_triton(images_BHWC, boxes, spec, made, colours_VB5)
    elif images_BHWC.device.type == "cpu" and views_cpu.why_unavailable() is None:
        job = views_cpu.Job(boxes, spec, made, colours_VB5)
        views_cpu.make_views_cpu(images_BHWC, job, torch.get_num_threads())
    else:
        made.copy_(reference_views(images_BHWC, boxes, spec, colours_VB5))
    return made
