"""`pcl-fast` with a CIFAR-10 of 160 images: `python -m tests.commands.small_cifar train demo`.

Its files are those of CIFAR-10 but for the number of records and their content; all else is the product.
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from datasets_prep.cifar import CIFAR10, IMAGE_BYTES, RELEASES
from pcl_fast.cli import main

TEST_IMAGES = 60
SMALL = replace(
    CIFAR10,
    train=tuple(replace(batch, records=20) for batch in CIFAR10.train),
    test=replace(CIFAR10.test, records=TEST_IMAGES),
)


def write_files(root: Path) -> None:
    """Random pictures, and all ten labels in turn."""
    draws = np.random.default_rng(0)
    folder = root / SMALL.folder
    folder.mkdir(parents=True)
    for batch in SMALL.batches:
        records = draws.integers(0, 256, (batch.records, 1 + IMAGE_BYTES), np.uint8)
        records[:, 0] = np.arange(batch.records) % 10
        (folder / batch.file).write_bytes(records.tobytes())


def read_test_file(root: Path) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Images [60, 3, 32, 32] and labels [60]."""
    records = np.fromfile(root / SMALL.folder / SMALL.test.file, np.uint8).reshape(TEST_IMAGES, -1)
    return records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0]


if __name__ == "__main__":
    RELEASES["cifar10"] = SMALL
    sys.exit(main())
