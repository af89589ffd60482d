"""DALI's part: each image is decoded once; perhaps its crops are resized, mirrored and normalised, too."""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pcl_fast.errors import ConfigError
from pipelines.boxes import Boxes
from pipelines.dali_feed import Fed
from pipelines.view_spec import ViewSpec

AHEAD = 2
"""Batches that DALI decodes before they are asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a pipeline is to do, with how many threads, and on which device (None: on the CPU)."""

    batch_size: int
    threads: int
    device_id: int | None
    decode_on_device: bool
    crops: ViewSpec | None = None
    """None: the images come out, on a device padded to the largest of the batch."""
    num_views: int = 1
    centre: bool = False


def require_dali() -> None:
    """Import DALI.

    Raises:
        ConfigError: if it is not installed, with the way to get it.
    """
    try:
        _dali()
    except ImportError as error:
        raise ConfigError(
            f"--data.backend dali: NVIDIA DALI cannot be imported ({error}); "
            "pip install 'pcl-fast[dali]', or give --data.backend ffcv or torch"
        ) from error


def _dali() -> Any:
    # Untyped: its stubs know neither the data types nor which calls return a list.
    return importlib.import_module("nvidia.dali")


def build(plan: Plan, feed: Callable[[], tuple[Any, ...]]) -> Any:
    """A pipeline whose inputs are what `feed` returns (`inputs`), until it raises StopIteration.

    Its outputs: the decoded images and, on a device, these padded to one size; or each view
    `[B, S, S, 3]`, float32 and normalised, followed by the decoded images.
    """
    dali = _dali()
    fn, types = dali.fn, dali.types

    views = plan.num_views if plan.crops is not None else 0
    parts = (types.INT32, types.INT32, types.INT32, *((types.FLOAT, types.INT32) if plan.centre else ()))
    ranks = (1, 1, 0, *((1, 1) if plan.centre else ()))

    @dali.pipeline_def(
        batch_size=plan.batch_size,
        num_threads=plan.threads,
        device_id=plan.device_id,
        prefetch_queue_depth=AHEAD,
    )
    def define() -> Any:
        encoded, *boxes = fn.external_source(
            feed,
            num_outputs=1 + views * len(parts),
            batch=True,
            no_copy=True,  # whoever feeds keeps the memory until the batch has come out
            dtype=[types.UINT8, *parts * views],
            ndim=[1, *ranks * views],
        )
        decoded = _decode(plan, encoded)
        if plan.crops is None:
            return decoded if plan.device_id is None else (decoded, fn.pad(decoded, axes=(0, 1)))
        given = [boxes[at : at + len(parts)] for at in range(0, len(boxes), len(parts))]
        return (*(_crop(decoded, plan.crops, of_view) for of_view in given), decoded)

    pipeline = define()
    pipeline.build()
    return pipeline


def inputs(plan: Plan, fed: Fed, boxes: Boxes[NDArray[Any]] | None) -> tuple[Any, ...]:
    """What `build`'s pipeline takes of a batch: its bytes, and for crops by DALI where they are."""
    if plan.crops is None or boxes is None:
        return (fed.encoded,)
    given: list[NDArray[Any]] = []
    for view, (boxes_B4, flip_B) in enumerate(zip(boxes.boxes_VB4, boxes.flip_VB, strict=True)):
        given += [boxes_B4[:, :2].astype(np.int32), boxes_B4[:, 2:].astype(np.int32), flip_B.astype(np.int32)]
        if boxes.grids_VB4 is not None:
            grids_B4 = boxes.grids_VB4[view]
            given += [grids_B4[:, :2].astype(np.float32), grids_B4[:, 2:].astype(np.int32)]
    return (fed.encoded, *given)


def _decode(plan: Plan, encoded: Any) -> Any:
    """The pixels that PIL has: EXIF's orientation ignored, chroma interpolated."""
    fn, types = _dali().fn, _dali().types

    on_device = plan.decode_on_device
    images = fn.decoders.image(
        encoded,
        device="mixed" if on_device else "cpu",
        output_type=types.RGB,
        adjust_orientation=False,
        jpeg_fancy_upsampling=True,
    )
    return images if on_device or plan.device_id is None else images.gpu()


def _crop(images: Any, spec: ViewSpec, given: Sequence[Any]) -> Any:
    """A view of each image: sliced first, so that the filter does not see what is beyond the box."""
    fn, types = _dali().fn, _dali().types

    start, shape, flip, grid, offset = (*given, None, None)[:5]
    box = fn.slice(images, start=start, shape=shape, axes=(0, 1))
    resized = fn.resize(
        box,
        size=[spec.size, spec.size] if grid is None else grid,
        interp_type=types.INTERP_LINEAR,
        antialias=True,
        dtype=types.FLOAT,
    )
    if offset is not None:
        resized = fn.slice(resized, start=offset, shape=[spec.size, spec.size], axes=(0, 1))
    return fn.crop_mirror_normalize(
        resized,
        mirror=flip,
        mean=[255 * mean for mean in spec.normalisation.mean],
        std=[255 * std for std in spec.normalisation.std],
        dtype=types.FLOAT,
        output_layout="HWC",
    )
