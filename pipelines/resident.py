"""A data set that lives in the device's memory, and is shuffled and augmented there.

For data sets of CIFAR's kind: all images of one size and small enough to be held twice, as bytes.
There are no workers and no queue: a batch is a dozen small kernels on the device that trains.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pcl_fast.contract import EvalBatch, ViewBatch
from pcl_fast.errors import ConfigError, DataError
from pipelines.cifar_views import CropTable, Normaliser, draw_crops
from pipelines.normalisation import Normalisation
from pipelines.order import check_first_step, epoch_order, steps_per_epoch


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalOptions:
    """How a resident data set is served: in batches of `batch_size`, on `device`, in one layout."""

    batch_size: int
    num_classes: int
    normalisation: Normalisation
    device: torch.device
    channels_last: bool

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ConfigError(f"the batch size is {self.batch_size}: it must be at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOptions(EvalOptions):
    """How a resident data set is served for training; `seed` has 32 bits."""

    num_views: int
    seed: int
    drop_last: bool

    def __post_init__(self) -> None:
        EvalOptions.__post_init__(self)  # super() does not work in a dataclass with slots
        if self.num_views < 1:
            raise ConfigError(f"the number of views is {self.num_views}: it must be at least 1")
        if not 0 <= self.seed < 1 << 32:
            raise ConfigError(f"the seed is {self.seed}: it must be from 0 to {(1 << 32) - 1}")


class ResidentTrainLoader:
    """Serves augmented views of images held on the device; a `TrainLoader`.

    A view depends on (seed, epoch, sample, view) alone and the order on (seed, epoch): neither the
    batch size nor the step an epoch is resumed at changes what a sample looks like. A pass over the
    data is drawn at its start (a few milliseconds); a step is then gathers and the normalisation.
    """

    def __init__(self, images_NCHW: Tensor, labels_N: Tensor, options: TrainOptions) -> None:
        """Move the data to the device: images uint8 `[N, C, H, W]`, labels int64 `[N]`.

        Raises:
            DataError: for data that is empty, too little for one batch, or not of these types,
                shapes and classes.
        """
        check_data(images_NCHW, labels_N, options)
        self.options = options
        self.num_samples = len(images_NCHW)
        self.steps_per_epoch = steps_per_epoch(self.num_samples, options.batch_size, options.drop_last)
        if self.steps_per_epoch == 0:
            raise DataError(
                f"{self.num_samples} training samples do not fill one batch of {options.batch_size}: "
                "use a smaller batch size, more samples, or keep the last, shorter batch"
            )
        size = (images_NCHW.shape[2], images_NCHW.shape[3])
        self.labels_N = labels_N.to(options.device)
        self.table = CropTable(images_NCHW, options.device, options.channels_last)
        self.normalise = Normaliser(options.normalisation, size, options.device, options.channels_last)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[ViewBatch]:
        """Yield the batches of an epoch (0-based) from batch `first_step` on.

        Raises:
            ConfigError: for a step that the epoch does not have.
        """
        check_first_step(first_step, self.steps_per_epoch)
        return self._batches(epoch, first_step)

    def _batches(self, epoch: int, first_step: int) -> Iterator[ViewBatch]:
        options = self.options
        order_N = epoch_order(self.num_samples, options.seed, epoch, options.device)
        order_N = order_N[first_step * options.batch_size : self.steps_per_epoch * options.batch_size]
        crops = draw_crops(order_N, options.num_views, options.seed, epoch)
        starts_VNP = self.table.locate(order_N, crops)
        labels_N = self.labels_N[order_N]
        for begin in range(0, len(order_N), options.batch_size):
            batch = slice(begin, begin + options.batch_size)
            images_BCHW = self.normalise(self.table.read(starts_VNP[:, batch]))
            yield ViewBatch(
                views_VBCHW=images_BCHW.unflatten(0, (options.num_views, -1)),
                labels_B=labels_N[batch],
                sample_ids_B=order_N[batch],
            )


class ResidentEvalLoader:
    """Serves un-augmented images held on the device; an `EvalLoader`.

    The samples come in their own order, and the last batch is shorter if need be.
    """

    def __init__(self, images_NCHW: Tensor, labels_N: Tensor, options: EvalOptions) -> None:
        """Move the data to the device: images uint8 `[N, C, H, W]`, labels int64 `[N]`.

        Raises:
            DataError: for data that is empty or not of these types, shapes and classes.
        """
        check_data(images_NCHW, labels_N, options)
        layout = torch.channels_last if options.channels_last else torch.contiguous_format
        size = (images_NCHW.shape[2], images_NCHW.shape[3])
        self.num_samples = len(images_NCHW)
        self.batch_size = options.batch_size
        self.images_NCHW = images_NCHW.to(options.device, memory_format=layout)
        self.labels_N = labels_N.to(options.device)
        self.normalise = Normaliser(options.normalisation, size, options.device, options.channels_last)

    def __iter__(self) -> Iterator[EvalBatch]:
        """Yield every batch once."""
        for begin in range(0, self.num_samples, self.batch_size):
            batch = slice(begin, begin + self.batch_size)
            yield EvalBatch(self.normalise(self.images_NCHW[batch]), self.labels_N[batch])


def check_data(images_NCHW: Tensor, labels_N: Tensor, options: EvalOptions) -> None:
    """Refuse a data set that is empty, or whose images or labels are not what the options say.

    Raises:
        DataError: naming what was found and what is needed.
    """
    channels = len(options.normalisation.mean)
    shape = list(images_NCHW.shape)
    if images_NCHW.dtype != torch.uint8:
        raise DataError(f"the images are {images_NCHW.dtype}: they must be torch.uint8, 0 to 255")
    if images_NCHW.ndim != 4 or shape[1] != channels:
        raise DataError(f"the images have shape {shape}: it must be [samples, {channels}, height, width]")
    if shape[0] == 0:
        raise DataError("the data set is empty: it has no images")
    if images_NCHW.numel() == 0:
        raise DataError(f"the images have shape {shape}: they have no pixels")
    if labels_N.dtype != torch.int64:
        raise DataError(f"the labels are {labels_N.dtype}: they must be torch.int64")
    if labels_N.shape != images_NCHW.shape[:1]:
        raise DataError(
            f"the labels have shape {list(labels_N.shape)}: it must be [{shape[0]}], one an image"
        )
    outside_N = (labels_N < 0) | (labels_N >= options.num_classes)
    if outside_N.any():
        where = int(outside_N.nonzero()[0])
        raise DataError(
            f"sample {where} has label {int(labels_N[where])}: "
            f"labels of {options.num_classes} classes are 0 to {options.num_classes - 1}"
        )
