"""The straightforward way: PIL and torchvision in the workers of torch's DataLoader.

What every faster loader is measured against, and the fastest of the ways that people write it: an image
is decoded by PIL once, each view is torchvision's `resized_crop` with antialiasing of the decoded
tensor, flipped, and handed over as bytes; the consumer normalises on its device. (Crops by PIL itself
take three times as long, and floats from the workers four times the memory traffic.) Only the crops are
ours: drawn from (seed, epoch, sample, view), so that neither workers nor ranks nor the step an epoch is
resumed at change a pixel.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, default_collate
from torchvision.transforms.v2 import functional as F

from pcl_fast.contract import EvalBatch, ViewBatch, ended
from pcl_fast.errors import DataError
from pipelines.boxes import CropRule, draw_boxes_numpy
from pipelines.cifar_views import Normaliser
from pipelines.colours import jittered
from pipelines.images import ImageSource, check_labels, decode, open_images
from pipelines.options import ImageEvalOptions, ImageOptions, ImageTrainOptions
from pipelines.order import EpochPlan, share
from pipelines.workers import made_by_workers

# What a worker makes of a batch: images, labels, ids; or in words why it could not.
Made = tuple[Tensor, Tensor, Tensor] | str


class TorchTrainLoader:
    """Serves augmented views of a folder of images or a .beton file; a `TrainLoader`.

    Worker processes live as long as the iterator of an epoch.
    """

    def __init__(self, path: Path, options: ImageTrainOptions) -> None:
        """Open the images.

        Raises:
            DataError: if they are missing, damaged, of other classes, or too few for one batch.
            ConfigError: for options that do not fit them.
        """
        self.source, self.options = open_images(path), options
        check_labels(self.source, options.num_classes)
        self.plan = EpochPlan.of(len(self.source.labels_N), options, self.source.page_of_N)
        self.num_samples, self.steps_per_epoch = self.plan.num_samples, self.plan.steps_per_epoch

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[ViewBatch]:
        """Yield the batches of an epoch (0-based) from batch `first_step` on; closing ends the workers.

        The iterator raises DataError naming the image that cannot be decoded, PclError if a worker dies.

        Raises:
            ConfigError: for a step that the epoch does not have.
        """
        batches = self.plan.batches(epoch, first_step)
        return self._batches(_TrainImages(self.source, self.options.in_epoch(epoch), epoch), batches)

    @staticmethod
    def _batches(images: "_TrainImages", batches: Sequence[Tensor]) -> Iterator[ViewBatch]:
        options = images.options
        finish = _Finish(options)
        with ended(_load(images, batches, options)) as made:
            for views, labels_B, samples_B in made:
                ids_B = finish.move(samples_B)
                drawn = (ids_B, options.num_views, options.seed, images.epoch, options.colours)
                pixels = jittered(finish.move(views), *drawn)
                views_VBCHW = finish(pixels).unflatten(0, (options.num_views, -1))
                yield ViewBatch(views_VBCHW, finish.move(labels_B), ids_B)


class TorchEvalLoader:
    """Serves the centres of a folder of images or a .beton file, in order; an `EvalLoader`.

    Of several ranks each serves its share, a run of samples; `num_samples` are those of all ranks.
    """

    def __init__(self, path: Path, options: ImageEvalOptions) -> None:
        """Open the images.

        Raises:
            DataError: if they are missing, damaged, or of other classes.
        """
        self.source, self.options = open_images(path), options
        check_labels(self.source, options.num_classes)
        self._chosen_N = options.chosen(len(self.source.labels_N))
        self.num_samples = len(self._chosen_N)

    def __iter__(self) -> Iterator[EvalBatch]:
        """Yield every batch once, the last one shorter if need be."""
        options = self.options
        ids = self._chosen_N[share(self.num_samples, options.rank, options.world_size)]
        batches = ids.split(options.batch_size) if len(ids) else ()
        finish = _Finish(options)
        with ended(_load(_EvalImages(self.source, options), batches, options)) as made:
            for images, labels_B, _ in made:
                yield EvalBatch(finish(images), finish.move(labels_B))


class _Images(Dataset[Made]):
    """Makes whole batches: `__getitems__` takes the ids of one."""

    def __init__(self, source: ImageSource) -> None:
        self.source = source

    def __getitems__(self, ids: list[int]) -> Made:
        try:
            images = self.views([decode(self.source, sample) for sample in ids], ids)
        except DataError as error:  # told by the consumer: the worker's traceback helps nobody
            return str(error)
        # Collating in the worker writes straight into memory that is shared with the trainer.
        return default_collate(images), torch.from_numpy(self.source.labels_N[ids]), torch.tensor(ids)

    def views(self, images: list[Image.Image], ids: list[int]) -> list[Tensor]:
        """Every view of the batch, view by view."""
        raise NotImplementedError


class _TrainImages(_Images):
    def __init__(self, source: ImageSource, options: ImageTrainOptions, epoch: int) -> None:
        super().__init__(source)
        self.options, self.epoch = options, epoch
        self.rule = CropRule(options.scale, options.ratio)

    def views(self, images: list[Image.Image], ids: list[int]) -> list[Tensor]:
        options = self.options
        sizes_B2 = np.array([(image.height, image.width) for image in images])
        boxes = draw_boxes_numpy(
            sizes_B2, np.array(ids), options.num_views, options.seed, self.epoch, self.rule
        )
        pixels = [F.pil_to_tensor(image) for image in images]
        return [
            _view(pixels[place], box.tolist(), bool(flip), options.image_size)
            for boxes_B4, flip_B in zip(boxes.boxes_VB4, boxes.flip_VB, strict=True)
            for place, (box, flip) in enumerate(zip(boxes_B4, flip_B, strict=True))
        ]


class _EvalImages(_Images):
    def __init__(self, source: ImageSource, options: ImageEvalOptions) -> None:
        super().__init__(source)
        self.options = options

    def views(self, images: list[Image.Image], ids: list[int]) -> list[Tensor]:
        return [_centre(F.pil_to_tensor(image), self.options) for image in images]


def _view(pixels_CHW: Tensor, box: list[int], flip: bool, size: int) -> Tensor:
    view_CHW = F.resized_crop(pixels_CHW, *box, size=[size, size], antialias=True)
    return F.horizontal_flip(view_CHW) if flip else view_CHW


def _centre(pixels_CHW: Tensor, options: ImageEvalOptions) -> Tensor:
    resized_CHW = F.resize(pixels_CHW, [options.resize], antialias=True)
    return F.center_crop(resized_CHW, [options.image_size])


def _load(
    images: _Images, batches: Sequence[Tensor], options: ImageOptions
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The batches as the workers make them, in order."""
    pin_memory = options.device.type == "cuda"
    with ended(made_by_workers(images, batches, options.workers, pin_memory)) as all_made:
        for made in all_made:
            if isinstance(made, str):
                raise DataError(made)
            yield made


class _Finish:
    """Moves what workers made to the device, and normalises it there."""

    def __init__(self, options: ImageOptions) -> None:
        self.options = options
        size = (options.image_size, options.image_size)
        self.normalise = Normaliser(options.normalisation, size, options.device, options.channels_last)

    def __call__(self, pixels_BCHW: Tensor) -> Tensor:
        return self.normalise(self.move(pixels_BCHW)).to(self.options.dtype)

    def move(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.options.device, non_blocking=True)
