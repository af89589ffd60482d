"""NVIDIA DALI: each image of a .beton file or a folder decoded once, on the CPU or by the GPU's decoders.

The views are made by our kernels from DALI's pixels, where they lie, or by DALI. On a CPU its pixels are
PIL's, to the bit: libjpeg-turbo decodes in both, and what DALI would read differently (CMYK, other
formats) is decoded by PIL beforehand. Order and crops are drawn from (seed, epoch, sample, view), so
that neither threads nor ranks nor the step an epoch is resumed at change a pixel; there is no state to
save. A pipeline lives as long as the iterator of an epoch, so that a damaged image, after which DALI's
pipelines are of no use, leaves the loader as it was.

Our crops are PIL's. DALI's own repeat the pixels of a box's rim where the filter reaches beyond, which
PIL leaves out: the outermost rows and columns of views that are smaller than their box differ by some
gray levels, the rest by less than 1/50 of one. On two cores they take three times as long.
"""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pcl_fast.contract import EvalBatch, ViewBatch
from pcl_fast.errors import ConfigError
from pipelines import views_cpu
from pipelines.background import in_background
from pipelines.boxes import Boxes, CropRule, centre_boxes_numpy, draw_boxes_numpy
from pipelines.colours import draw_colours
from pipelines.dali_pipeline import Plan, require_dali
from pipelines.dali_work import BoxRule, Made, Work
from pipelines.images import ImageSource, check_labels, open_images
from pipelines.options import ImageEvalOptions, ImageOptions, ImageTrainOptions
from pipelines.order import EpochPlan, share
from pipelines.recycled import Recycler
from pipelines.view_spec import ViewSpec

# One waits while one is made: a batch of three views of 256 images is 460 MB in float32.
BATCHES_AHEAD = 2


class DaliTrainLoader:
    """Serves augmented views of a folder of images or a .beton file; a `TrainLoader`.

    Threads live as long as the iterator of an epoch.
    """

    def __init__(self, path: Path, options: ImageTrainOptions) -> None:
        """Open the images.

        Raises:
            DataError: if they are missing, damaged, of other classes, or too few for one batch.
            ConfigError: for options that do not fit them, or without DALI.
        """
        if options.colours is not None and options.crops == "library":
            raise ConfigError(
                "--data.crops library: DALI's own crops have no colour jitter; leave it out, or "
                "--data.color-jitter"
            )
        self.source, self.options = _open(path, options), options
        self.plan = EpochPlan.of(len(self.source.labels_N), options, self.source.page_of_N)
        self.num_samples, self.steps_per_epoch = self.plan.num_samples, self.plan.steps_per_epoch
        self._work = _work(self.source, options, options.num_views)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[ViewBatch]:
        """Yield the batches of an epoch (0-based) from batch `first_step` on; closing ends the threads.

        The iterator raises DataError naming the image that cannot be decoded.

        Raises:
            ConfigError: for a step that the epoch does not have.
        """
        options = self.options
        rule = CropRule(options.scale, options.ratio)

        def boxes(sizes_B2: NDArray[np.int64], ids_B: NDArray[np.int64]) -> Boxes[NDArray[np.int64]]:
            found = draw_boxes_numpy(sizes_B2, ids_B, options.num_views, options.seed, epoch, rule)
            if options.colours is None:
                return found
            ids = torch.from_numpy(ids_B)
            drawn = draw_colours(ids, options.num_views, options.seed, epoch, options.colours)
            return dataclasses.replace(found, colours_VB5=drawn.numpy())

        work = self._work.resized(options.in_epoch(epoch).image_size)
        return self._views(work, self.plan.batches(epoch, first_step), boxes)

    def _views(self, work: Work, batches: Sequence[Tensor], boxes: BoxRule) -> Iterator[ViewBatch]:
        for made in _served(work, batches, boxes, self.options):
            yield ViewBatch(made.views_VBCSS, made.labels_B, made.ids_B)


class DaliEvalLoader:
    """Serves the centres of a folder of images or a .beton file, in order; an `EvalLoader`.

    Of several ranks each serves its share, a run of samples; `num_samples` are those of all ranks.
    """

    def __init__(self, path: Path, options: ImageEvalOptions) -> None:
        """Open the images.

        Raises:
            DataError: if they are missing, damaged, or of other classes.
            ConfigError: for options that do not fit them, or without DALI.
        """
        self.source, self.options = _open(path, options), options
        self._chosen_N = options.chosen(len(self.source.labels_N))
        self.num_samples = len(self._chosen_N)
        self._work = _work(self.source, options, num_views=1, centre=True)

    def __iter__(self) -> Iterator[EvalBatch]:
        """Yield every batch once, the last one shorter if need be."""
        options = self.options
        ids = self._chosen_N[share(self.num_samples, options.rank, options.world_size)]

        def boxes(sizes_B2: NDArray[np.int64], _: NDArray[np.int64]) -> Boxes[NDArray[np.int64]]:
            return centre_boxes_numpy(sizes_B2, options.image_size, options.resize)

        batches = ids.split(options.batch_size) if len(ids) else ()
        for made in _served(self._work, batches, boxes, options):
            yield EvalBatch(made.views_VBCSS[0], made.labels_B)


def _open(path: Path, options: ImageOptions) -> ImageSource:
    require_dali()
    source = open_images(path)
    check_labels(source, options.num_classes)
    return source


def _work(source: ImageSource, options: ImageOptions, num_views: int, centre: bool = False) -> Work:
    device, on_cuda = options.device, options.device.type == "cuda"
    if options.decode == "gpu" and not on_cuda:
        raise ConfigError(
            f"--data.decode gpu: the device is {device}; give --device cuda or --data.decode cpu"
        )
    if on_cuda:
        device = torch.empty(0, device=device).device  # with its index
    spec = ViewSpec(
        normalisation=options.normalisation,
        size=options.image_size,
        dtype=options.dtype,
        channels_last=options.channels_last,
    )
    plan = Plan(
        batch_size=options.batch_size,
        threads=options.workers or len(os.sched_getaffinity(0)),
        device_id=device.index if on_cuda else None,
        decode_on_device=on_cuda and options.decode != "cpu",
        padded=on_cuda or views_cpu.why_unavailable() is not None,
        crops=spec if options.crops == "library" else None,
        num_views=num_views,
        centre=centre,
    )
    return Work(source, plan, spec, device, Recycler(BATCHES_AHEAD + 2))


def _served(work: Work, batches: Sequence[Tensor], boxes: BoxRule, options: ImageOptions) -> Iterator[Made]:
    """The batches; made ahead in a thread, or without workers when they are asked for."""
    if options.workers == 0:
        ready = work.run(batches, boxes)
    else:
        ready = in_background(lambda: work.run(batches, boxes), BATCHES_AHEAD)
    with closing(ready):
        for made in ready:
            yield made.receive()
