"""The straightforward way to feed CIFAR: torchvision's transforms, view by view, in torch's DataLoader."""

import contextlib
import itertools
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from pcl_fast.contract import ViewBatch
from pcl_fast.device import memory_format

PADDING = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainOptions:
    """How images are served; `mean` and `std` are the channels', `workers` are processes."""

    batch_size: int
    num_views: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    device: torch.device
    channels_last: str
    workers: int
    drop_last: bool


class PlainLoader:
    """Serves padded, cropped, flipped and normalised views of images held in memory; a `TrainLoader`.

    Its views are drawn from its workers' random numbers, as everywhere. The workers live on from epoch to
    epoch; they end when an epoch is left before its end, and with `close`.
    """

    def __init__(self, images_NCHW: Tensor, labels_N: Tensor, options: PlainOptions) -> None:
        """Images uint8 [N, 3, H, W], labels int64 [N]."""
        self.options = options
        views = _Views(images_NCHW, labels_N, options)
        self._loader: DataLoader[Any] = DataLoader(
            views,
            options.batch_size,
            shuffle=True,
            num_workers=options.workers,
            pin_memory=options.device.type == "cuda",
            drop_last=options.drop_last,
            persistent_workers=options.workers > 0,
            worker_init_fn=_leave_interrupts_to_the_trainer,
            generator=torch.Generator().manual_seed(0),
        )
        self.num_samples, self.steps_per_epoch = len(images_NCHW), len(self._loader)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[ViewBatch]:
        """Yield batches until every image has been seen once; the first `first_step` are dropped."""
        with contextlib.ExitStack() as early:
            early.callback(self.close)
            for views, labels_B, ids_B in itertools.islice(self._loader, first_step, None):
                yield ViewBatch(self._on_device(views), self._move(labels_B), self._move(ids_B))
            early.pop_all()

    def close(self) -> None:
        """End the workers."""
        loader: Any = self._loader
        iterator, loader._iterator = loader._iterator, None
        getattr(iterator, "_shutdown_workers", lambda: None)()

    def _on_device(self, views: list[Tensor]) -> Tensor:
        images = self._move(torch.cat(views) if len(views) > 1 else views[0])
        images = images.contiguous(memory_format=memory_format(self.options.channels_last))
        return images.unflatten(0, (len(views), -1))

    def _move(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.options.device, non_blocking=True)


class _Views(Dataset[tuple[list[Tensor], Tensor, int]]):
    """Every view of an image, its label and its number."""

    def __init__(self, images_NCHW: Tensor, labels_N: Tensor, options: PlainOptions) -> None:
        self.images_NCHW, self.labels_N, self.num_views = images_NCHW, labels_N, options.num_views
        self.transform = v2.Compose(
            [
                v2.RandomCrop(images_NCHW.shape[-1], padding=PADDING),
                v2.RandomHorizontalFlip(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(options.mean, options.std),
            ]
        )

    def __len__(self) -> int:
        return len(self.images_NCHW)

    def __getitem__(self, index: int) -> tuple[list[Tensor], Tensor, int]:
        views = [self.transform(self.images_NCHW[index]) for _ in range(self.num_views)]
        return views, self.labels_N[index], index


def _leave_interrupts_to_the_trainer(_: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
