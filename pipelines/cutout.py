"""Cutout, DeVries and Taylor 2017: a square of each view becomes zeros, which are the mean colour.

Around any loader, on the device where its batches are. The centre of a square is uniform over the view, and
what is beyond the view is lost. It is drawn from (seed, epoch, sample, view) alone, so that neither batches
nor ranks nor the step an epoch is resumed at change a pixel.
"""

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from pcl_fast.contract import DeviceLoader, TrainLoader, ViewBatch, close_if_possible, ended
from pcl_fast.philox import Stream, below_torch, philox_torch


def with_cutout(loader: TrainLoader, size: int, seed: int, device: torch.device) -> TrainLoader:
    """The loader, whose batches are on `device`, with squares of `size` pixels cut out; itself for 0."""
    if size == 0:
        return loader
    if isinstance(loader, DeviceLoader):
        return DeviceCutoutLoader(loader, size, seed, device)
    return CutoutLoader(loader, size, seed)


class CutoutLoader:
    """A `TrainLoader`: the batches of another one, whose views are copied, with a square cut out of each."""

    def __init__(self, loader: TrainLoader, size: int, seed: int) -> None:
        self.loader, self.size, self.seed = loader, size, seed

    @property
    def num_samples(self) -> int:
        """Samples in the data set, those of all ranks."""
        return self.loader.num_samples

    @property
    def steps_per_epoch(self) -> int:
        """Batches an epoch."""
        return self.loader.steps_per_epoch

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[ViewBatch]:
        """Yield the batches of an epoch (0-based) from batch `first_step` on; raises what the loader does."""
        return self._batches(self.loader.epoch(epoch, first_step), epoch)

    def _batches(self, batches: Iterator[ViewBatch], epoch: int) -> Iterator[ViewBatch]:
        with ended(batches):
            for batch in batches:
                yield self._cut(batch, epoch)

    def close(self) -> None:
        """Close the loader, if it can be closed."""
        close_if_possible(self.loader)

    def _cut(self, batch: ViewBatch, epoch: int | Tensor) -> ViewBatch:
        views_VBCHW = batch.views_VBCHW
        views, _, _, height, width = views_VBCHW.shape
        shape = (views, height, width)
        holes_VBHW = draw_holes(batch.sample_ids_B, shape, self.size, self.seed, epoch)
        cut_VBCHW = torch.where(holes_VBHW.unsqueeze(2), 0.0, views_VBCHW)
        return dataclasses.replace(batch, views_VBCHW=cut_VBCHW)


class DeviceCutoutLoader(CutoutLoader):
    """The same of a `DeviceLoader`, which it is, too: a CUDA graph can hold `take`."""

    def __init__(self, loader: DeviceLoader, size: int, seed: int, device: torch.device) -> None:
        super().__init__(loader, size, seed)
        self._maker = loader
        self._epoch = torch.zeros((), dtype=torch.int64, device=device)

    @property
    def batch_size(self) -> int:
        """Images in a batch, of this rank."""
        return self._maker.batch_size

    @property
    def is_even(self) -> bool:
        """Whether every batch has `batch_size` images, of one size."""
        return self._maker.is_even

    def begin(self, epoch: int, first_step: int = 0) -> None:
        """Lay an epoch (0-based) out on the device, at batch `first_step`; raises what the loader does."""
        self._maker.begin(epoch, first_step)
        self._epoch.fill_(epoch)

    def take(self) -> ViewBatch:
        """The next batch of the epoch, by device operations only."""
        return self._cut(self._maker.take(), self._epoch)


def draw_holes(
    sample_ids_B: Tensor, shape: tuple[int, int, int], size: int, seed: int, epoch: int | Tensor
) -> Tensor:
    """Which pixels are cut out: bool [V, B, H, W], for (V, H, W) = `shape`.

    A square reaches from `size` // 2 pixels above and left of its centre. `epoch` may be a tensor on the
    samples' device; nothing synchronises.
    """
    views, *extents = shape
    views_V1 = torch.arange(views, device=sample_ids_B.device).unsqueeze(1)
    words = philox_torch((seed, Stream.CUTOUT), epoch, sample_ids_B, views_V1, 0)
    rows_VBH, columns_VBW = (
        _near(below_torch(word, extent), extent, size) for word, extent in zip(words, extents, strict=False)
    )
    return rows_VBH.unsqueeze(3) & columns_VBW.unsqueeze(2)


def _near(centres_VB: Tensor, extent: int, size: int) -> Tensor:
    """Which of `extent` places are in a square with this centre."""
    places = torch.arange(extent, device=centres_VB.device) - (centres_VB.unsqueeze(2) - size // 2)
    return (places >= 0) & (places < size)
