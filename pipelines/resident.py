"""A data set that lives in the device's memory, and is shuffled and augmented there.

For data sets of CIFAR's kind: all images of one size and small enough to be held twice, as bytes.
There are no workers and no queue: a batch is a dozen small kernels on the device that trains.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pcl_fast.contract import EvalBatch, ViewBatch
from pcl_fast.device import has_triton
from pcl_fast.errors import ConfigError, DataError
from pipelines.cifar_views import CropTable, Normaliser, draw_crops
from pipelines.colours import ColourRule, jittered
from pipelines.normalisation import Normalisation
from pipelines.order import (
    check_first_step,
    check_last_batch,
    check_rank,
    epoch_order,
    kept_ids,
    rank_order,
    share,
    steps_per_epoch,
)
from pipelines.resident_data import check_data


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalOptions:
    """How a resident data set is served: in batches of `batch_size`, on `device`, in one layout.

    In evaluation every sample goes to exactly one of the `world_size` ranks.
    """

    batch_size: int
    num_classes: int
    normalisation: Normalisation
    device: torch.device
    channels_last: bool
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ConfigError(f"the batch size is {self.batch_size}: it must be at least 1")
        check_rank(self.rank, self.world_size)

    @property
    def global_batch(self) -> int:
        """Images in a batch of all ranks."""
        return self.batch_size * self.world_size


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOptions(EvalOptions):
    """How a resident data set is served for training; `seed` has 32 bits.

    Views are float32, or of `dtype` where a kernel makes them: on CUDA, channels-last. A global batch is
    `batch_size * world_size` samples, of which each rank has its part.
    """

    num_views: int
    seed: int
    drop_last: bool
    dtype: torch.dtype = torch.float32
    hold_out: int = 0
    """So many samples, drawn by the seed, are never served."""
    colours: ColourRule | None = None
    """How colours are jittered, after the crop; views are float32 then."""

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
    Of several ranks each holds all images and draws its own share of the pass.
    """

    def __init__(self, images_NCHW: Tensor, labels_N: Tensor, options: TrainOptions) -> None:
        """Move the data to the device: images uint8 `[N, C, H, W]`, labels int64 `[N]`.

        Raises:
            DataError: for data that is empty, too little for one batch, or not of these types,
                shapes and classes.
            ConfigError: for a last batch too short to give every rank a sample, or if all is held out.
        """
        check_data(images_NCHW, labels_N, len(options.normalisation.mean), options.num_classes)
        self.options = options
        kept_N = kept_ids(len(images_NCHW), options.hold_out, options.seed)
        self._kept_N = None if kept_N is None else kept_N.to(options.device)
        self.num_samples = len(images_NCHW) if kept_N is None else len(kept_N)
        global_batch = options.global_batch
        check_last_batch(self.num_samples, global_batch, options.world_size, options.drop_last)
        self.steps_per_epoch = steps_per_epoch(self.num_samples, global_batch, options.drop_last)
        if self.steps_per_epoch == 0:
            raise DataError(
                f"{self.num_samples} training samples do not fill one batch of {global_batch}: "
                "use a smaller batch size, more samples, or keep the last, shorter batch"
            )
        size = (images_NCHW.shape[2], images_NCHW.shape[3])
        self.labels_N = labels_N.to(options.device)
        self.table = CropTable(images_NCHW, options.device, options.channels_last)
        self.normalise = Normaliser(options.normalisation, size, options.device, options.channels_last)
        self.batch_size = options.batch_size
        self.is_even = self.steps_per_epoch * global_batch <= self.num_samples
        self._laid: Epoch | None = None
        self._rows_B = torch.arange(options.batch_size, device=options.device)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[ViewBatch]:
        """Yield the batches of an epoch (0-based) from batch `first_step` on.

        Raises:
            ConfigError: for a step that the epoch does not have.
        """
        check_first_step(first_step, self.steps_per_epoch)
        return self._batches(epoch, first_step)

    def _batches(self, epoch: int, first_step: int) -> Iterator[ViewBatch]:
        batch_size = self.options.batch_size
        laid = self._lay_out(epoch)
        for begin in range(first_step * batch_size, len(laid.order_N), batch_size):
            rows = slice(begin, begin + batch_size)
            part = Epoch(laid.order_N[rows], laid.starts_VNP[:, rows], laid.labels_N[rows])
            yield self._make(part, epoch)

    def begin(self, epoch: int, first_step: int = 0) -> None:
        """Lay an epoch out on the device, for `take` to serve from batch `first_step` on.

        Raises:
            ConfigError: for a step that the epoch does not have.
        """
        check_first_step(first_step, self.steps_per_epoch)
        laid = self._lay_out(epoch)
        if self._laid is None:
            self._laid = laid
            self._step, self._number = torch.zeros(2, dtype=torch.int64, device=self.options.device).unbind()
        else:
            for place, values in zip(self._laid, laid, strict=True):
                place.copy_(values)
        self._step.fill_(first_step)
        self._number.fill_(epoch)

    def take(self) -> ViewBatch:
        """The next batch of the epoch that `begin` has laid out; its place in it is kept on the device."""
        assert self._laid is not None, "begin comes before take"
        if self._has_kernel():
            batch = self._take_by_kernel(self._laid)
            self._step += 1
            return batch
        rows_B = self._rows_B + self._step * self.batch_size
        self._step += 1
        order_N, starts_VNP, labels_N = self._laid
        labels_B, ids_B = labels_N.index_select(0, rows_B), order_N.index_select(0, rows_B)
        return self._make(Epoch(ids_B, starts_VNP.index_select(1, rows_B), labels_B), self._number)

    def _has_kernel(self) -> bool:
        options = self.options
        fits = options.channels_last and options.colours is None
        return options.device.type == "cuda" and fits and has_triton()

    def _take_by_kernel(self, laid: "Epoch") -> ViewBatch:
        from pipelines.resident_triton import Place, take_triton

        table, options = self.table, self.options
        place = Place(self._step, self.batch_size, (table.height, table.width), table.row)
        return ViewBatch(*take_triton(table.pixels, laid, place, options.normalisation, options.dtype))

    def _lay_out(self, epoch: int) -> "Epoch":
        options = self.options
        order_N = epoch_order(self.num_samples, options.seed, epoch, options.device)
        order_N = order_N[: self.steps_per_epoch * options.global_batch]
        if self._kept_N is not None:
            order_N = self._kept_N[order_N]
        order_N = rank_order(order_N, options.global_batch, options.rank, options.world_size)
        crops = draw_crops(order_N, options.num_views, options.seed, epoch)
        return Epoch(order_N, self.table.locate(order_N, crops), self.labels_N[order_N])

    def _make(self, batch: "Epoch", epoch: int | Tensor) -> ViewBatch:
        """The views of a part of an epoch, which is number `epoch`."""
        ids_B, options = batch.order_N, self.options
        drawn = (ids_B, options.num_views, options.seed, epoch, options.colours)
        images_BCHW = self.normalise(jittered(self.table.read(batch.starts_VNP), *drawn))
        views_VBCHW = images_BCHW.unflatten(0, (options.num_views, -1))
        return ViewBatch(views_VBCHW=views_VBCHW, labels_B=batch.labels_N, sample_ids_B=ids_B)


class Epoch(NamedTuple):
    """A rank's epoch on the device: its samples in order, where each of their views begins, their labels."""

    order_N: Tensor
    starts_VNP: Tensor
    labels_N: Tensor


class ResidentEvalLoader:
    """Serves un-augmented images held on the device; an `EvalLoader`.

    The samples come in their own order, and the last batch is shorter if need be. Of several ranks each
    holds and serves its share, a run of samples; `num_samples` are those of all ranks.
    """

    def __init__(self, images_NCHW: Tensor, labels_N: Tensor, options: EvalOptions) -> None:
        """Move the data to the device: images uint8 `[N, C, H, W]`, labels int64 `[N]`.

        Raises:
            DataError: for data that is empty or not of these types, shapes and classes.
        """
        check_data(images_NCHW, labels_N, len(options.normalisation.mean), options.num_classes)
        layout = torch.channels_last if options.channels_last else torch.contiguous_format
        size = (images_NCHW.shape[2], images_NCHW.shape[3])
        self.num_samples = len(images_NCHW)
        self.batch_size = options.batch_size
        mine = share(self.num_samples, options.rank, options.world_size)
        self.images_NCHW = images_NCHW[mine].to(options.device, memory_format=layout)
        self.labels_N = labels_N[mine].to(options.device)
        self.normalise = Normaliser(options.normalisation, size, options.device, options.channels_last)

    def __iter__(self) -> Iterator[EvalBatch]:
        """Yield every batch once."""
        for begin in range(0, len(self.labels_N), self.batch_size):
            batch = slice(begin, begin + self.batch_size)
            yield EvalBatch(self.normalise(self.images_NCHW[batch]), self.labels_N[batch])
