"""How batches reach a step: what the host does before it, and what the device does in it."""

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import torch

from pcl_fast.contract import DeviceLoader, TrainLoader, ViewBatch, close_if_possible
from pcl_fast.first_batch import checked

Check = Callable[[ViewBatch], None]


class BatchShape(NamedTuple):
    """What batches have in common that a graph can be of: so many `images`, views of so many `pixels`.

    `pixels` is None where they are always the same.
    """

    images: int
    pixels: int | None


class Feed(Protocol):
    """The batches of one epoch at a time: `advance` on the host, then `take` in the step."""

    def begin(self, epoch: int, first_step: int) -> None:
        """Open an epoch (0-based) at its batch `first_step`. Raises what the loader raises."""
        ...

    def advance(self) -> BatchShape | None:
        """Get the next batch ready: its shape, or None at the end of the epoch."""
        ...

    def take(self) -> ViewBatch:
        """The batch that is ready; device operations only, so that a graph can hold them."""
        ...

    def close(self) -> None:
        """End what the loader holds for the open epoch."""
        ...


def make_feed(loader: TrainLoader, check: Check, fixed: bool) -> Feed:
    """The feed of a loader; `fixed`, each shape of batch always lies in the same memory."""
    if isinstance(loader, DeviceLoader) and loader.is_even:
        return DeviceFeed(loader, check)
    return HostFeed(loader, check, fixed)


class DeviceFeed:
    """Batches that the device makes by itself. `check` sees the first of all and may raise."""

    def __init__(self, loader: DeviceLoader, check: Check) -> None:
        self._loader, self._check, self._left = loader, check, 0
        self._checked = self._fresh = False

    def begin(self, epoch: int, first_step: int) -> None:
        """Open an epoch at its batch `first_step`."""
        self._loader.begin(epoch, first_step)
        self._left = self._loader.steps_per_epoch - first_step
        if not self._checked:
            self._check(self._loader.take())
            self._loader.begin(epoch, first_step)
            self._checked = True

    def advance(self) -> BatchShape | None:
        """The shape of the next batch; nothing else is to do."""
        self._left -= 1
        return BatchShape(self._loader.batch_size, None) if self._left >= 0 else None

    def take(self) -> ViewBatch:
        """The next batch."""
        return self._loader.take()

    def close(self) -> None:
        """Nothing is open."""


class HostFeed:
    """Batches from an iterator on the host. `check` sees the first of each epoch and may raise."""

    def __init__(self, loader: TrainLoader, check: Check, fixed: bool) -> None:
        self._loader, self._check, self._fixed = loader, check, fixed
        self._batches: Iterator[ViewBatch] = iter(())
        self._places: dict[BatchShape, ViewBatch] = {}
        self._ready: ViewBatch | None = None

    def begin(self, epoch: int, first_step: int) -> None:
        """Open an epoch at its batch `first_step`."""
        self.close()
        self._batches = checked(self._loader.epoch(epoch, first_step), self._check)

    def advance(self) -> BatchShape | None:
        """Fetch the next batch; copied to its fixed place, if it has one."""
        batch = next(self._batches, None)
        if batch is None:
            return None
        shape = BatchShape(len(batch.labels_B), batch.views_VBCHW.shape[-1])
        self._ready = self._placed(batch, shape) if self._fixed else batch
        return shape

    def _placed(self, batch: ViewBatch, shape: BatchShape) -> ViewBatch:
        place = self._places.get(shape)
        if place is None:
            tensors = (batch.views_VBCHW, batch.labels_B, batch.sample_ids_B)
            place = self._places[shape] = ViewBatch(*(torch.empty_like(tensor) for tensor in tensors))
        place.views_VBCHW.copy_(batch.views_VBCHW, non_blocking=True)
        place.labels_B.copy_(batch.labels_B, non_blocking=True)
        place.sample_ids_B.copy_(batch.sample_ids_B, non_blocking=True)
        return place

    def take(self) -> ViewBatch:
        """The batch fetched last."""
        assert self._ready is not None, "advance comes before take"
        return self._ready

    def close(self) -> None:
        """End the open iterator, with its threads and processes."""
        close_if_possible(self._batches)
