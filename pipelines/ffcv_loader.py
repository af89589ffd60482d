"""FFCV: a .beton file decoded by threads without the interpreter's lock, each image once for all its views.

Of FFCV are the reader, the memory map, the compiled pipeline and its thread. Ours is the operation in it
(ffcv_kernel.py): it decodes as PIL does, to the bit, and says what is damaged. Views are made at once by
the thread that decoded, or, on a CUDA device, there: the host then sends bytes, once an image. Order and
crops are drawn from (seed, epoch, sample, view), so neither workers nor ranks nor the step that an epoch
is resumed at change a pixel.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from pcl_fast.contract import EvalBatch, ViewBatch
from pcl_fast.errors import ConfigError
from pipelines import views_cpu
from pipelines.augment import random_boxes
from pipelines.boxes import Boxes, CropRule, centre_boxes
from pipelines.colours import with_colours
from pipelines.ffcv_work import BoxRule, CheckedImages, Decoded, Served, ViewsOnTheDevice, ViewsWhenDecoded
from pipelines.images import check_labels
from pipelines.options import ImageEvalOptions, ImageOptions, ImageTrainOptions
from pipelines.order import EpochPlan, share
from pipelines.read_ahead import ReadAhead
from pipelines.recycled import Recycler
from pipelines.view_spec import COLOURS, ViewSpec

# Two wait while one is made: a batch of three views of 256 images is 460 MB in float32.
BATCHES_AHEAD = 2
MOST_BYTES = 8 << 30  # of a batch of padded images; 256 of 500 x 500 pixels are 0.2 GB
MakeViews = Literal["auto", "decoder", "device"]
Work = ViewsWhenDecoded | ViewsOnTheDevice


class FfcvTrainLoader:
    """Serves augmented views of a .beton file; a `TrainLoader`.

    Threads live as long as the iterator of an epoch.
    """

    def __init__(self, path: Path, options: ImageTrainOptions, make_views: MakeViews = "auto") -> None:
        """Open the file; `make_views`: in the decoding threads, or on the device in one go.

        Raises:
            DataError: if it is missing, damaged, of other classes, or too small for one batch.
            ConfigError: for options that do not fit it.
        """
        self.options = options
        self._engine = _Engine(path, options, make_views)
        samples = self._engine.samples
        if options.order == "pages":
            self._engine.window_pages = options.window_pages
        self.plan = EpochPlan.of(len(samples.labels_N), options, samples.page_of_N)
        self.num_samples, self.steps_per_epoch = self.plan.num_samples, self.plan.steps_per_epoch

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[ViewBatch]:
        """Yield the batches of an epoch (0-based) from batch `first_step` on; closing ends the threads.

        The iterator raises DataError naming a sample that is damaged.

        Raises:
            ConfigError: for a step that the epoch does not have.
        """
        batches = self.plan.batches(epoch, first_step)
        return self._views(self._engine.batches(batches, self._work(epoch)))

    def host_part(self, epoch: int) -> Generator[Decoded]:
        """The batches of an epoch as the host leaves them to the device, without their views: to measure it.

        For a loader made with make_views="device".
        """
        work = self._work(epoch)
        assert isinstance(work, ViewsOnTheDevice)
        return self._engine.made(self.plan.batches(epoch), work)

    def _work(self, epoch: int) -> Work:
        options = self.options.in_epoch(epoch)
        rule = CropRule(options.scale, options.ratio)

        def boxes(sizes_B2: Tensor, ids_B: Tensor) -> Boxes[Tensor]:
            found = random_boxes(sizes_B2, ids_B, options.num_views, options.seed, epoch, rule)
            return with_colours(found, ids_B, options.seed, epoch, options.colours)

        return self._engine.work(boxes, options.image_size)

    @staticmethod
    def _views(served: Generator[Served]) -> Iterator[ViewBatch]:
        with contextlib.closing(served):
            for batch in served:
                yield ViewBatch(batch.views_VBCSS, batch.labels_B, batch.ids_B)


class FfcvEvalLoader:
    """Serves the centres of the images of a .beton file, in order; an `EvalLoader`.

    Of several ranks each serves its share, a run of samples; `num_samples` are those of all ranks.
    """

    def __init__(self, path: Path, options: ImageEvalOptions, make_views: MakeViews = "auto") -> None:
        """Open the file.

        Raises:
            DataError: if it is missing, damaged, or of other classes.
        """
        self.options = options
        self._engine = _Engine(path, options, make_views)
        self._chosen_N = options.chosen(len(self._engine.samples.labels_N))
        self.num_samples = len(self._chosen_N)

    def __iter__(self) -> Iterator[EvalBatch]:
        """Yield every batch once, the last one shorter if need be."""
        options = self.options
        ids = self._chosen_N[share(self.num_samples, options.rank, options.world_size)]

        def boxes(sizes_B2: Tensor, _: Tensor) -> Boxes[Tensor]:
            return centre_boxes(sizes_B2, options.image_size, options.resize)

        batches = ids.split(options.batch_size) if len(ids) else ()
        work = self._engine.work(boxes, options.image_size)
        with contextlib.closing(self._engine.batches(batches, work)) as served:
            for batch in served:
                yield EvalBatch(batch.views_VBCSS[0], batch.labels_B)


class _Engine:
    """What training and evaluation have in common: FFCV's loader of a file, and how views are made."""

    def __init__(self, path: Path, options: ImageOptions, make_views: MakeViews) -> None:
        self.parts = _import_parts()
        self.samples = CheckedImages(path, self.parts.why_damaged)
        check_labels(self.samples, options.num_classes)
        with self.parts.settings_kept():
            self.loader = self.parts.open_loader(
                str(path), options.batch_size, options.workers, BATCHES_AHEAD
            )
        self.device = options.device
        self.spec = ViewSpec(
            normalisation=options.normalisation,
            size=options.image_size,
            dtype=options.dtype,
            channels_last=options.channels_last,
        )
        by_decoder = options.device.type == "cpu" and views_cpu.why_unavailable() is None
        self.in_decoder = make_views == "decoder" or (make_views == "auto" and by_decoder)
        if not self.in_decoder:
            _check_padding(self.samples, options.batch_size)
        self.natives = self.parts.native_addresses(views_cpu.image_function() if self.in_decoder else None)
        self.memory = Recycler(BATCHES_AHEAD + 2)
        self.window_pages: int | None = None

    def batches(self, batches: Sequence[Tensor], work: Work) -> Generator[Served]:
        """The batches of these samples; the thread starts with the first, and ends with the generator."""
        with contextlib.closing(self.made(batches, work)) as made_batches:
            for made in made_batches:
                yield work.serve(made)

    def work(self, boxes: BoxRule, size: int) -> Work:
        """What is made of the batches of an epoch: views of `size` x `size` pixels."""
        spec = dataclasses.replace(self.spec, size=size)
        if self.in_decoder:
            return ViewsWhenDecoded(self.samples, spec, self.memory, boxes)
        return ViewsOnTheDevice(self.samples, spec, self.memory, boxes, self.device)

    def made(self, batches: Sequence[Tensor], work: Work) -> Generator[Any]:
        """The batches as FFCV's threads leave them; the thread ends with the generator."""
        if not batches:
            return
        order = torch.cat(tuple(batches)).numpy()
        with self._reading_ahead(batches) as read_ahead:
            epoch = self.parts.Epoch(self.loader, order, work, self.natives, read_ahead)
            try:
                yield from epoch
            finally:
                epoch.end()

    @contextlib.contextmanager
    def _reading_ahead(self, batches: Sequence[Tensor]) -> Generator[Callable[[int], None]]:
        if self.window_pages is None:
            yield lambda step: None
            return
        with contextlib.closing(ReadAhead(self.samples.file, batches, self.window_pages)) as read_ahead:
            yield read_ahead


def _check_padding(samples: CheckedImages, batch_size: int) -> None:
    """Refuse images so large that batches of them, padded to the largest, do not fit anywhere."""
    height, width = map(int, samples.file.sizes_N2.max(0))
    if batch_size * height * width * COLOURS > MOST_BYTES:
        raise ConfigError(
            f"{samples.path}: images of up to {height} x {width} pixels are too large to send {batch_size} "
            f"of them to a device as they are; shrink them: `pcl-fast convert` with --max-side 500"
        )


def _import_parts() -> ModuleType:
    from pipelines import ffcv_parts

    return ffcv_parts
