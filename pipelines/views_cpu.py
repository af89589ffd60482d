"""Views on the CPU, in C++: of a whole batch by some threads, or of one image by a thread of the caller's.

A loader that decodes in threads of its own, without the interpreter's lock, calls `image_function()` for each
image with the address of a `Job`: numba can call it, too.
"""

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from pcl_fast import native
from pipelines.boxes import Boxes
from pipelines.view_spec import COLOURS, ViewSpec

SOURCE = Path(__file__).with_suffix(".cpp")
ADDRESS = ctypes.c_int64


class JobFields(ctypes.Structure):
    """What the C++ is told of a batch: `Job` there."""

    _fields_ = (
        *((name, ADDRESS) for name in ("boxes", "grids", "flips", "colours", "out")),
        *((name, ctypes.c_int64) for name in ("views", "batch", "size", "channels", "planar", "half")),
        ("scale", ctypes.c_float * COLOURS),
        ("shift", ctypes.c_float * COLOURS),
    )


class Job:
    """The views to make of a batch and the memory they go to, which live as long as it does."""

    def __init__(
        self, boxes: Boxes[Tensor], spec: ViewSpec, views_VBCSS: Tensor, colours_VB5: Tensor | None = None
    ) -> None:
        """Ask for the views `boxes` in `views_VBCSS`, made by `spec.empty`; everything on the CPU.

        Nothing is copied but what is not dense: a tensor that changes later changes what the job asks for.
        """
        assert spec.takes(views_VBCSS), (views_VBCSS.dtype, views_VBCSS.shape, views_VBCSS.stride())
        views, batch = views_VBCSS.shape[:2]
        asked = (boxes.boxes_VB4, boxes.grids_VB4, boxes.flip_VB, colours_VB5)
        for tensor, dtype in zip(asked, (torch.int64, torch.int64, torch.bool, torch.float32), strict=True):
            assert tensor is None or (tensor.dtype == dtype and tensor.shape[:2] == (views, batch)), tensor
        self.boxes_VB4 = boxes.boxes_VB4
        self.kept = (*(None if tensor is None else tensor.contiguous() for tensor in asked), views_VBCSS)
        addresses = (0 if tensor is None else tensor.data_ptr() for tensor in self.kept)
        half, planar = spec.dtype == torch.bfloat16, not spec.channels_last
        scale, shift = ((ctypes.c_float * COLOURS)(*numbers) for numbers in spec.scale_and_shift)
        sizes = (views, batch, spec.size, spec.channels, planar, half)
        self.fields = JobFields(*addresses, *sizes, scale, shift)

    @property
    def address(self) -> int:
        """Where its fields lie, for `image_function`."""
        return ctypes.addressof(self.fields)


def image_function() -> Callable[[int, int, int, int], None]:
    """`f(job, pixels, stride, index)`: every view of image `index`, in the thread that calls.

    `job` is `Job.address`, `pixels` the address of uint8 RGB, `stride` the bytes from one row to the next. It
    takes no lock, starts no thread, and may be called for many images at once.

    Raises:
        KernelUnavailableError: without a C++ compiler.
    """
    return native.function(SOURCE, "views_of_image", (ADDRESS,) * 4)


def make_views_cpu(images_BHWC: Tensor, job: Job, threads: int) -> None:
    """Make all views of a job from uint8 `[B, H, W, 3]`, of which each image may fill a part.

    Raises:
        KernelUnavailableError: without a C++ compiler.
    """
    image_stride, row_stride, *dense = images_BHWC.stride()
    assert images_BHWC.dtype == torch.uint8, images_BHWC.dtype
    assert dense == [COLOURS, 1], images_BHWC.stride()
    top, left, height, width = job.boxes_VB4.unbind(-1)
    inside = (top + height <= images_BHWC.shape[1]) & (left + width <= images_BHWC.shape[2])
    assert (inside & (job.boxes_VB4[..., :2] >= 0).all(-1) & (height > 0) & (width > 0)).all(), (
        "boxes beyond images"
    )
    run = native.function(SOURCE, "views_of_batch", (*(ADDRESS,) * 4, ctypes.c_int))
    run(job.address, images_BHWC.data_ptr(), row_stride, image_stride, threads)


def why_unavailable() -> str | None:
    """The reason, in one line, why there is no C++ kernel here; None where there is one."""
    return native.why_unavailable(SOURCE)
