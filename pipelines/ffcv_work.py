"""What FFCV's thread makes of each batch: its views at once, or pixels that a device makes views of."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines import ffcv_kernel as kernel
from pipelines.augment import make_views
from pipelines.boxes import Boxes
from pipelines.images import BetonImages
from pipelines.recycled import Recycler
from pipelines.view_spec import COLOURS, ViewSpec
from pipelines.views_cpu import Job

# Of int64 sizes [B, 2] and sample ids [B], on the device where the views are made.
BoxRule = Callable[[Tensor, Tensor], Boxes[Tensor]]
Table = NDArray[np.int64]
NOT_CHECKED = -1


class CheckedImages(BetonImages):
    """Images whose bytes the kernel holds against their checksums, when they are first read."""

    def __init__(self, path: Path, why: Callable[[memoryview, int, int], str]) -> None:
        """Open the file; `why(bytes, height, width)` tells what is wrong with a JPEG.

        Raises:
            DataError: if it is not a whole .beton file.
        """
        super().__init__(path)
        self._why = why

    def ask(self, ids_B: NDArray[np.int64], table: Table) -> None:
        """Have those checked that have not been."""
        table[:, kernel.CHECKSUM] = NOT_CHECKED
        if self.manifest is not None:
            fresh_B = self._unchecked_N[ids_B]
            table[fresh_B, kernel.CHECKSUM] = self.manifest.checksums_N[ids_B[fresh_B]]

    def judge(self, ids_B: NDArray[np.int64], table: Table) -> None:
        """Take note of what was checked.

        Raises:
            DataError: naming the first sample that is damaged. What libjpeg only warns of (stray bytes,
                mostly) is damage, too, unless a checksum says that the conversion has seen the same bytes.
        """
        worst = kernel.DONE if self.manifest is None else kernel.WARNED
        status_B = table[:, kernel.STATUS]
        if (status_B > worst).any():
            row = int((status_B > worst).argmax())
            sample = int(ids_B[row])
            if status_B[row] == kernel.CHANGED:
                raise self.damaged(sample, "its checksum is wrong")
            height, width = map(int, self.file.sizes_N2[sample])
            raise self.damaged(sample, self._why(self.file.encoded(sample), height, width))
        self._unchecked_N[ids_B] = False


@dataclass(frozen=True, slots=True)
class Served:
    """A batch as the consumer gets it: views `[V, B, C, S, S]`, labels and ids, on the device."""

    views_VBCSS: Tensor
    labels_B: Tensor
    ids_B: Tensor


class ViewsWhenDecoded:
    """The views of an image are made by the thread that decoded it, while the image is in its cache."""

    def __init__(self, samples: CheckedImages, spec: ViewSpec, memory: Recycler, boxes: BoxRule) -> None:
        self.samples, self.spec, self.memory, self.boxes = samples, spec, memory, boxes

    def begin(self, ids_B: NDArray[np.int64], table: Table) -> tuple[Tensor, Job]:
        """Draw the boxes, and have the views written to memory of the batch's own."""
        sizes_B2 = torch.from_numpy(self.samples.file.sizes_N2[ids_B])
        boxes = self.boxes(sizes_B2, torch.from_numpy(ids_B))
        views, batch = boxes.flip_VB.shape
        like = self.spec.empty(views, batch, torch.device("meta"))
        memory = self.memory.empty(like.numel() * like.element_size())
        views_VBCSS = memory.view(like.dtype).as_strided(like.shape, like.stride())
        job = Job(boxes, self.spec, views_VBCSS, boxes.colours_VB5)
        self.samples.ask(ids_B, table)
        table[:, kernel.OUT], table[:, kernel.JOB] = 0, job.address
        return views_VBCSS, job

    def end(self, ids_B: NDArray[np.int64], table: Table, begun: tuple[Tensor, Job]) -> Served:
        """The views, if nothing is wrong."""
        self.samples.judge(ids_B, table)
        return Served(begun[0], torch.from_numpy(self.samples.labels_N[ids_B]), torch.from_numpy(ids_B))

    def serve(self, made: Served) -> Served:
        """Nothing is left to do for the consumer."""
        return made


@dataclass(frozen=True, slots=True)
class Decoded:
    """Images in the upper left of `[B, H, W, 3]`, and their sizes; `copied` if that happens meanwhile."""

    images_BHWC: Tensor
    sizes_B2: Tensor
    labels_B: Tensor
    ids_B: Tensor
    copied: torch.Event | None


class ViewsOnTheDevice:
    """Each image is sent once, as bytes, and its views are made where they are wanted.

    A batch is as high and wide as the highest and widest of its images.
    """

    def __init__(
        self, samples: CheckedImages, spec: ViewSpec, memory: Recycler, boxes: BoxRule, device: torch.device
    ) -> None:
        self.samples, self.spec, self.memory, self.boxes, self.device = samples, spec, memory, boxes, device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def begin(self, ids_B: NDArray[np.int64], table: Table) -> Tensor:
        """Have the images decoded to memory of the batch's own."""
        height, width = map(int, self.samples.file.sizes_N2[ids_B].max(0))
        shape, size = (len(ids_B), height, width, COLOURS), height * width * COLOURS
        if self.stream:
            images_BHWC = torch.empty(shape, dtype=torch.uint8, pin_memory=True)
        else:
            images_BHWC = self.memory.empty(len(ids_B) * size).view(shape)
        self.samples.ask(ids_B, table)
        table[:, kernel.OUT] = images_BHWC.data_ptr() + size * np.arange(len(ids_B))
        table[:, kernel.STRIDE], table[:, kernel.JOB] = width * COLOURS, 0
        return images_BHWC

    def end(self, ids_B: NDArray[np.int64], table: Table, begun: Tensor) -> Decoded:
        """The images, if nothing is wrong, on their way to the device."""
        self.samples.judge(ids_B, table)
        file, labels_N = self.samples.file, self.samples.labels_N
        sizes_B2, labels_B, ids = map(torch.from_numpy, (file.sizes_N2[ids_B], labels_N[ids_B], ids_B))
        if self.stream is None:
            return Decoded(begun, sizes_B2, labels_B, ids, None)
        with torch.cuda.stream(self.stream):
            return Decoded(
                begun.to(self.device, non_blocking=True),
                sizes_B2.to(self.device),
                labels_B.to(self.device),
                ids.to(self.device),
                self.stream.record_event(),
            )

    def serve(self, made: Decoded) -> Served:
        """Make the views, in the order of what the consumer's stream is doing."""
        if made.copied:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(made.copied)
            for tensor in (made.images_BHWC, made.sizes_B2, made.labels_B, made.ids_B):
                tensor.record_stream(current)
        boxes = self.boxes(made.sizes_B2, made.ids_B)
        views_VBCSS = make_views(made.images_BHWC, boxes, self.spec, boxes.colours_VB5)
        return Served(views_VBCSS, made.labels_B, made.ids_B)
