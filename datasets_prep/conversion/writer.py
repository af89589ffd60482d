"""Where samples lie in a .beton file, and everything of it but the samples' data.

The layout depends on the order and the lengths of the samples alone: each follows the one before, or
begins the next page if it would cross the end of this one.
"""

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pcl_fast.beton import (
    ALLOCATION,
    FIELD,
    FIELDS,
    HEADER,
    MAX_PAGE_SIZE,
    SAMPLE,
    SAMPLES_AT,
    VERSION,
)

PAGE_SIZE = 1 << 23  # FFCV's default
TABLE_ALIGNMENT = 8


class Layout:
    """Gives each sample its place, one after the other, in a file for at most `capacity` samples."""

    def __init__(self, capacity: int, page_size: int) -> None:
        self.page_size = page_size
        # Room for every image of the source: how many will be bad is not known before the end.
        self.position = -(-(SAMPLES_AT + capacity * SAMPLE.itemsize) // page_size) * page_size

    def place(self, length: int) -> int:
        """The offset of a sample of `length` bytes, at most a page."""
        assert 0 < length <= self.page_size
        room = self.page_size - self.position % self.page_size
        offset = self.position if length <= room else self.position + room
        self.position = offset + length
        return offset


def page_size_for(largest: int) -> int | None:
    """The size of pages that hold a sample of `largest` bytes, FFCV's default at least; None: too large."""
    size = PAGE_SIZE
    while size < largest:
        size *= 2
    return size if size <= MAX_PAGE_SIZE else None


def finish_file(path: Path, page_size: int, samples: NDArray[np.void], lengths_N: NDArray[np.int64]) -> None:
    """Write header, descriptors, `samples` (SAMPLE) and the table around the data that are there."""
    end = int(samples["offset"][-1]) + int(lengths_N[-1])
    table_offset = -(-end // TABLE_ALIGNMENT) * TABLE_ALIGNMENT
    header = np.zeros(1, HEADER)
    header[0] = (VERSION, len(FIELDS), page_size, len(samples), table_offset)
    fields = np.zeros(len(FIELDS), FIELD)
    fields["name"] = [name.encode() for name, _ in FIELDS]
    fields["type_id"] = [type_id for _, type_id in FIELDS]
    table = np.zeros(len(samples), ALLOCATION)
    table["sample"] = np.arange(len(samples))
    table["offset"] = samples["offset"]
    table["length"] = lengths_N
    with path.open("r+b") as file:
        file.truncate(table_offset)
        file.write(header.tobytes() + fields.tobytes() + samples.tobytes())
        file.seek(table_offset)
        file.write(table.tobytes())
        file.flush()
        os.fsync(file.fileno())
