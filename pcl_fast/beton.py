"""The FFCV 1.0.2 file format (.beton), for data sets of one RGB image and one integer label a sample.

A file is a header, a descriptor for each field, a record for each sample, zeros up to a page boundary,
the image data in pages, and a table of where each sample's data lie. No sample crosses a page. All
numbers are little-endian. Nothing here needs FFCV.
"""

import mmap
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from pcl_fast.errors import DataError

VERSION = 2
MIN_PAGE_SIZE, MAX_PAGE_SIZE = 1 << 21, 1 << 31
JPG, RAW = 0, 1
FIELDS = (("image", 2), ("label", 1))  # the name and FFCV's number of the type: RGBImageField, IntField

HEADER = np.dtype(
    {
        "names": ["version", "num_fields", "page_size", "num_samples", "table_offset"],
        "formats": ["<u2", "<u2", "<u4", "<u8", "<u8"],
        "offsets": [0, 2, 4, 8, 16],
        "itemsize": 24,
    }
)
FIELD = np.dtype([("type_id", "u1"), ("name", "S16"), ("arguments", "V1024")])
SAMPLE = np.dtype(
    {
        "names": ["mode", "width", "height", "offset", "label"],
        "formats": ["u1", "<u2", "<u2", "<u8", "<i8"],
        "offsets": [0, 1, 3, 5, 16],
        "itemsize": 24,
    }
)
ALLOCATION = np.dtype([("sample", "<u8"), ("offset", "<u8"), ("length", "<u8")])
SAMPLES_AT = HEADER.itemsize + len(FIELDS) * FIELD.itemsize


@dataclass(frozen=True, kw_only=True, eq=False)
class BetonFile:
    """An open file whose structure has been checked; N samples in the order of their ids.

    `modes_N` is JPG or RAW. `offsets_N` and `lengths_N` are the byte ranges of the image data, and
    `page_of_N` is the page (the byte offset divided by `page_size`) that they lie in. `structure_crc32`
    covers everything but the image data. The file is mapped, not read; pickled, it is opened again.
    """

    path: Path
    num_samples: int
    page_size: int
    file_size: int
    structure_crc32: int
    labels_N: NDArray[np.int64]
    sizes_N2: NDArray[np.int64]
    modes_N: NDArray[np.uint8]
    offsets_N: NDArray[np.int64]
    lengths_N: NDArray[np.int64]
    page_of_N: NDArray[np.int64]
    _mapped: mmap.mmap

    def encoded(self, sample: int) -> memoryview:
        """The image data of a sample, not copied: a JPEG, or height x width x 3 bytes if it is raw."""
        start = int(self.offsets_N[sample])
        return memoryview(self._mapped)[start : start + int(self.lengths_N[sample])]

    def checksum(self, sample: int) -> int:
        """CRC-32 of the image data of a sample, as they are in the file now."""
        return zlib.crc32(self.encoded(sample))

    def close(self) -> None:
        """Unmap the file; if image data are still in use, that happens when they no longer are."""
        try:
            self._mapped.close()
        except BufferError:
            return

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return open_beton, (self.path,)


def open_beton(path: Path | str) -> BetonFile:
    """Open a .beton file of images and labels.

    DataError, naming what is wrong, if it is missing, cut, unfinished, of another version, of other
    fields, or inconsistent in any way that can be seen without reading the images.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < SAMPLES_AT:
                raise _broken(path, f"it has {size} bytes, less than the header of a .beton file")
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(f"{path} cannot be opened: {reason}; `pcl-fast convert` makes such files") from error
    return _checked(path, mapped)


def _checked(path: Path, mapped: mmap.mmap) -> BetonFile:
    page_size, num_samples, table_offset = _check_header(path, mapped)
    # Copies: arrays that look into the mapping would keep it from being closed.
    samples = np.frombuffer(mapped, SAMPLE, num_samples, SAMPLES_AT).copy()
    table = np.frombuffer(mapped, ALLOCATION, num_samples, table_offset).copy()
    table = table[np.argsort(table["sample"], kind="stable")]
    if not np.array_equal(table["sample"], np.arange(num_samples, dtype=np.uint64)):
        raise _broken(path, "its table does not hold each sample once")
    _check_samples(path, samples, table)
    _check_places(path, table, page_size, table_offset)
    ends = (memoryview(mapped)[: SAMPLES_AT + samples.nbytes], memoryview(mapped)[table_offset:])
    return BetonFile(
        path=path,
        num_samples=num_samples,
        page_size=page_size,
        file_size=len(mapped),
        structure_crc32=zlib.crc32(ends[1], zlib.crc32(ends[0])),
        labels_N=samples["label"].astype(np.int64),
        sizes_N2=np.stack([samples["height"], samples["width"]], axis=1).astype(np.int64),
        modes_N=samples["mode"].copy(),
        offsets_N=table["offset"].astype(np.int64),
        lengths_N=table["length"].astype(np.int64),
        page_of_N=table["offset"].astype(np.int64) // page_size,
        _mapped=mapped,
    )


def _check_header(path: Path, mapped: mmap.mmap) -> tuple[int, int, int]:
    """The page size, the number of samples, and where the table begins."""
    header = np.frombuffer(mapped[: HEADER.itemsize], HEADER)[0]
    version, num_fields, page_size, num_samples, table_offset = (int(value) for value in header)
    size = len(mapped)
    if version != VERSION:
        raise _broken(path, f"it is not a .beton file of version {VERSION} (its first number is {version})")
    if num_fields != len(FIELDS) or page_size < MIN_PAGE_SIZE or page_size & (page_size - 1):
        raise _broken(path, f"it has {num_fields} fields and pages of {page_size} bytes, which is not ours")
    fields = np.frombuffer(mapped[HEADER.itemsize : SAMPLES_AT], FIELD)
    found = tuple(
        (name.decode("latin-1"), int(kind))
        for name, kind in zip(fields["name"], fields["type_id"], strict=True)
    )
    if found != FIELDS:
        raise _broken(path, f"its fields are {found}, not an RGB image 'image' and an integer 'label'")
    if table_offset == 0:
        raise _broken(path, "it was never finished (its table is missing)")
    if num_samples == 0:
        raise _broken(path, "it holds no samples")
    samples_end, expected = (
        SAMPLES_AT + num_samples * SAMPLE.itemsize,
        table_offset + num_samples * ALLOCATION.itemsize,
    )
    if table_offset < samples_end:
        raise _broken(path, f"its header places the table at byte {table_offset}, inside the samples")
    if size != expected:
        what = "cut" if size < expected else "followed by something else"
        raise _broken(path, f"it is {what}: it has {size} bytes, its header says {expected}")
    return page_size, num_samples, table_offset


def _check_samples(path: Path, samples: NDArray[np.void], table: NDArray[np.void]) -> None:
    raw_bytes = 3 * samples["height"].astype(np.int64) * samples["width"]
    for what, wrong in (
        ("a place that is not the table's", samples["offset"] != table["offset"]),
        ("a mode that is neither JPEG nor raw", samples["mode"] > RAW),
        ("no pixels", raw_bytes == 0),
        ("no data", table["length"] == 0),
        ("not height x width x 3 bytes", (samples["mode"] == RAW) & (table["length"] != raw_bytes)),
        ("a negative label", samples["label"] < 0),
    ):
        if wrong.any():
            raise _broken(path, f"sample {int(wrong.argmax())} has {what}")


def _check_places(path: Path, table: NDArray[np.void], page_size: int, end: int) -> None:
    """Samples lie between the metadata and the table, each in one page, and none in another."""
    pages = np.uint64(page_size)
    order = np.argsort(table["offset"], kind="stable")
    starts, lengths = table["offset"][order], table["length"][order]
    first = SAMPLES_AT + len(table) * SAMPLE.itemsize
    # In this order no sum can overflow: starts and lengths have been bounded when they are added.
    outside = (starts < first) | (starts >= end) | (lengths > pages)
    if outside.any():
        raise _broken(path, f"sample {int(order[outside.argmax()])} lies outside of the image data")
    stops = starts + lengths
    crossing = (stops > end) | (starts // pages != (stops - np.uint64(1)) // pages)
    if crossing.any():
        raise _broken(path, f"sample {int(order[crossing.argmax()])} crosses the end of its page")
    overlapping = stops[:-1] > starts[1:]
    if overlapping.any():
        raise _broken(path, f"sample {int(order[1:][overlapping.argmax()])} overlaps another")


def _broken(path: Path, what: str) -> DataError:
    return DataError(f"{path} cannot be used: {what}; make it again with `pcl-fast convert`")
