"""A look at the first batch of a loader, before a network learns from what is not as agreed.

It waits for the device, so later batches are not looked at; whatever a loader does wrong by its nature
shows in the first.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from pcl_fast.contract import EvalBatch, EvalLoader, ViewBatch, ended
from pcl_fast.errors import DataError

Batch = TypeVar("Batch", ViewBatch, EvalBatch)
IMAGE_TYPES = (torch.float32, torch.bfloat16)


def checked(batches: Iterator[Batch], check: Callable[[Batch], None]) -> Iterator[Batch]:
    """The same batches; closing this closes them. `check` sees the first and may raise."""
    with ended(batches):
        for number, batch in enumerate(batches):
            if number == 0:
                check(batch)
            yield batch


@dataclass(frozen=True, slots=True)
class CheckedEvalLoader:
    """An evaluation loader, the first batch of which is checked in every pass."""

    loader: EvalLoader
    num_classes: int
    device: torch.device

    @property
    def num_samples(self) -> int:
        """Samples in the data set."""
        return self.loader.num_samples

    def __iter__(self) -> Iterator[EvalBatch]:
        """Yield every batch once."""
        return checked(iter(self.loader), lambda batch: check_images(batch, self.num_classes, self.device))


def check_views(batch: ViewBatch, num_views: int, num_classes: int, device: torch.device) -> None:
    """Raise DataError if a training batch is not as the contract says, naming what it should be."""
    views, labels = batch.views_VBCHW, batch.labels_B
    _require_shape("views", views, ("views", "images", 3, "height", "width"))
    if len(views) != num_views:
        raise _wrong(f"{len(views)} views of every image", f"it must make {num_views}, one for each peer")
    _check(views, labels, num_classes, device)
    _require_numbers("sample ids", batch.sample_ids_B, views.shape[1])
    if int(batch.sample_ids_B.min()) < 0:
        raise _wrong(f"the sample id {int(batch.sample_ids_B.min())}", "ids begin at 0")


def check_images(batch: EvalBatch, num_classes: int, device: torch.device) -> None:
    """Raise DataError if an evaluation batch is not as the contract says, naming what it should be."""
    _require_shape("images", batch.images_BCHW, ("images", 3, "height", "width"))
    _check(batch.images_BCHW[None], batch.labels_B, num_classes, device)


def _check(views_VBCHW: Tensor, labels_B: Tensor, num_classes: int, device: torch.device) -> None:
    for name, tensor in (("images", views_VBCHW), ("labels", labels_B)):
        if tensor.device.type != device.type:
            raise _wrong(f"{name} on {tensor.device}", f"training is on {device}")
    if views_VBCHW.dtype not in IMAGE_TYPES:
        raise _wrong(f"images of {views_VBCHW.dtype}", "they must be torch.float32 or torch.bfloat16")
    _require_numbers("labels", labels_B, views_VBCHW.shape[1])
    least, most = int(labels_B.min()), int(labels_B.max())
    if least < 0 or most >= num_classes:
        found = least if least < 0 else most
        raise _wrong(f"the label {found}", f"labels of {num_classes} classes are 0 to {num_classes - 1}")
    broken_B = ~views_VBCHW.isfinite().all(dim=4).all(dim=3).all(dim=2).all(dim=0)
    if broken_B.any():
        raise _wrong(
            f"pixels that are not finite, in image {int(broken_B.int().argmax())} of the batch",
            "normalised pixels are small numbers",
        )


def _require_shape(name: str, tensor: Tensor, shape: tuple[int | str, ...]) -> None:
    fits = tensor.dim() == len(shape) and tensor.numel() > 0
    if not fits or any(
        isinstance(want, int) and want != has for want, has in zip(shape, tensor.shape, strict=True)
    ):
        raise _wrong(f"{name} of shape {list(tensor.shape)}", f"it must be [{', '.join(map(str, shape))}]")


def _require_numbers(name: str, numbers_B: Tensor, images: int) -> None:
    if numbers_B.dtype != torch.int64:
        raise _wrong(f"{name} of {numbers_B.dtype}", "they must be torch.int64")
    if list(numbers_B.shape) != [images]:
        raise _wrong(f"{name} of shape {list(numbers_B.shape)}", f"it must be [{images}], one for each image")


def _wrong(found: str, needed: str) -> DataError:
    return DataError(f"the first batch of the loader has {found}: {needed}; is --data.backend the right one?")
