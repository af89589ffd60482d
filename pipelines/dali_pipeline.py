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
MOST_PADDED = 1 << 32
"""Bytes of a batch's padded images."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a pipeline is to do, with how many threads, and on which device (None: on the CPU)."""

    batch_size: int
    threads: int
    device_id: int | None
    decode_on_device: bool
    padded: bool
    """Have the images come out padded to one size, too, for views made of all of them at once."""
    crops: ViewSpec | None = None
    """The views that DALI is to make; None: the images come out."""
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

    Its outputs: the decoded images and perhaps these padded to one size (`padded_size`); or each view
    `[B, S, S, 3]`, float32 and normalised, followed by the decoded images.
    """
    dali = _dali()
    fn, types = dali.fn, dali.types

    kinds = [(types.UINT8, 1), *_kinds(plan, types)]

    @dali.pipeline_def(
        batch_size=plan.batch_size,
        num_threads=plan.threads,
        device_id=plan.device_id,
        prefetch_queue_depth=AHEAD,
    )
    def define() -> Any:
        encoded, *given = fn.external_source(
            feed,
            num_outputs=len(kinds),
            batch=True,
            no_copy=True,  # whoever feeds keeps the memory until the batch has come out
            dtype=[kind for kind, _ in kinds],
            ndim=[rank for _, rank in kinds],
        )
        decoded = _decode(plan, encoded)
        if plan.crops is not None:
            part = len(given) // plan.num_views
            views = [given[part * view : part * (view + 1)] for view in range(plan.num_views)]
            return (*(_crop(decoded, plan.crops, of_view) for of_view in views), decoded)
        if plan.padded:
            return decoded, fn.pad(decoded, axes=(0, 1), shape=given[0])
        return decoded

    pipeline = define()
    pipeline.build()
    return pipeline


def inputs(plan: Plan, fed: Fed, boxes: Boxes[NDArray[Any]]) -> tuple[Any, ...]:
    """What `build`'s pipeline takes of a batch: its bytes, and sizes to pad to or where crops are."""
    if plan.crops is None:
        return (fed.encoded, _extents(fed.sizes_B2)) if plan.padded else (fed.encoded,)
    given: list[NDArray[Any]] = []
    for view, (boxes_B4, flip_B) in enumerate(zip(boxes.boxes_VB4, boxes.flip_VB, strict=True)):
        given += [boxes_B4[:, :2].astype(np.int32), boxes_B4[:, 2:].astype(np.int32), flip_B.astype(np.int32)]
        if boxes.grids_VB4 is not None:
            grids_B4 = boxes.grids_VB4[view]
            given += [grids_B4[:, :2].astype(np.float32), grids_B4[:, 2:].astype(np.int32)]
    return (fed.encoded, *given)


def padded_size(sizes_B2: NDArray[np.int64]) -> tuple[int, int] | None:
    """The size that images are padded to; None if that took too much memory: one of them is huge."""
    height, width = map(int, sizes_B2.max(0))
    return None if 3 * len(sizes_B2) * height * width > MOST_PADDED else (height, width)


def _extents(sizes_B2: NDArray[np.int64]) -> NDArray[np.int32]:
    """To what DALI pads each image: images larger than that stay as they are."""
    return np.tile(np.array(padded_size(sizes_B2) or (1, 1), np.int32), (len(sizes_B2), 1))


def _kinds(plan: Plan, types: Any) -> list[tuple[Any, int]]:
    """Types and dimensions of what `inputs` gives beside the bytes."""
    if plan.crops is None:
        return [(types.INT32, 1)] * plan.padded
    grid = [(types.FLOAT, 1), (types.INT32, 1)] if plan.centre else []
    return [(types.INT32, 1), (types.INT32, 1), (types.INT32, 0), *grid] * plan.num_views


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
