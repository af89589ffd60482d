"""The images of a source in the order in which they are stored, and where the bytes of each are."""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pcl_fast.errors import ConfigError, DataError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
SPLIT_NAMES = {"train", "val", "valid", "validation", "test"}


@dataclass(frozen=True, slots=True)
class Place:
    """Where an image's bytes are: `size` bytes of a file from `offset` on."""

    file: str
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Item:
    """One image of a source; `name` is its path within the source, `stamp` a time of change in ns."""

    name: str
    label: int
    place: Place
    stamp: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Listing:
    """N images, kept in columns: ImageNet has 1.28 million.

    `title` says what the source is. `ignored` are files among them that are not taken for images.
    `codec` is how an image's bytes are read: as an image file, or as CIFAR's planes.
    """

    title: str
    classes: tuple[str, ...]
    names: list[str]
    labels_N: NDArray[np.int64]
    files: list[str]
    file_of_N: NDArray[np.int32]
    offsets_N: NDArray[np.int64]
    sizes_N: NDArray[np.int64]
    stamps_N: NDArray[np.int64]
    ignored: tuple[str, ...] = ()
    codec: Literal["image", "planes"] = "image"

    def __len__(self) -> int:
        return len(self.names)

    def place(self, index: int) -> Place:
        """Where the bytes of an image are."""
        folder_or_file = self.files[self.file_of_N[index]]
        offset = int(self.offsets_N[index])
        if offset < 0:  # a file of its own, in that folder
            return Place(os.path.join(folder_or_file, self.names[index]), 0, int(self.sizes_N[index]))
        return Place(folder_or_file, offset, int(self.sizes_N[index]))

    def identity(self, index: int) -> bytes:
        """Eight bytes that change when the image does, as far as can be told without reading it."""
        facts = (self.names[index], self.sizes_N[index], self.stamps_N[index], self.labels_N[index])
        return hashlib.blake2b(repr((facts[0], *map(int, facts[1:]))).encode(), digest_size=8).digest()


def make_listing(
    title: str, classes: tuple[str, ...], items: Iterator[Item], folder: Path | None = None
) -> Listing:
    """Put items into columns; with `folder`, each is a file of its own in there, at its name."""
    names: list[str] = []
    rows: list[tuple[int, int, int, int, int]] = []
    files: dict[str, int] = {}
    for item in items:
        names.append(item.name)
        holder = item.place.file if folder is None else str(folder)
        number = files.setdefault(holder, len(files))
        rows.append(
            (item.label, number, item.place.offset if folder is None else -1, item.place.size, item.stamp)
        )
    columns = np.array(rows, np.int64).reshape(-1, 5).T
    return Listing(
        title=title,
        classes=classes,
        names=names,
        labels_N=columns[0],
        files=list(files),
        file_of_N=columns[1].astype(np.int32),
        offsets_N=columns[2],
        sizes_N=columns[3],
        stamps_N=columns[4],
    )


def list_folder(source: Path, classes: tuple[str, ...] | None = None, title: str = "image folder") -> Listing:
    """`source/CLASS/.../IMAGE`: classes and images in alphabetical order, as torchvision's ImageFolder.

    `classes`: the labels are places in this list instead, and other folders are an error. ConfigError
    or DataError, with what to do, if that is not what is in `source`.
    """
    source = source.expanduser()
    folders = class_folders(source)
    names = classes or tuple(path.name for path in folders)
    if unknown := [path.name for path in folders if path.name not in names]:
        raise DataError(f"{source}: the folder {unknown[0]} is none of the {len(names)} classes")
    label_of = {name: label for label, name in enumerate(names)}
    ignored: list[str] = []

    def items() -> Iterator[Item]:
        for folder in folders:
            empty = True
            for path, stat in _files_below(folder):
                name = os.path.relpath(path, source)
                if not path.lower().endswith(EXTENSIONS):
                    ignored.append(name)
                    continue
                empty = False
                yield Item(name, label_of[folder.name], Place(path, 0, stat.st_size), stat.st_mtime_ns)
            if empty:
                raise DataError(f"{folder} holds no images: remove the folder, or unpack what belongs there")

    listing = make_listing(title, names, items(), source)
    object.__setattr__(listing, "ignored", tuple(ignored))
    return listing


def class_folders(source: Path) -> list[Path]:
    """The folders in `source`, sorted by name; an error with what to do if they are not classes."""
    if not source.is_dir():
        what = "is not a folder" if source.exists() else "does not exist"
        raise DataError(f"{source} {what}; give the folder that has one folder a class")
    children = sorted(path for path in source.iterdir() if not path.name.startswith("."))
    folders = [path for path in children if path.is_dir()]
    if not folders:
        images = any(path.suffix.lower() in EXTENSIONS for path in children)
        what = "holds images but no folders" if images else "holds no folders"
        raise DataError(f"{source} {what}; give the folder that has one folder a class, with images in them")
    if {path.name.lower() for path in folders} <= SPLIT_NAMES:
        first = folders[0]
        raise ConfigError(
            f"{source} holds {' and '.join(path.name for path in folders)}, which are splits, not classes: "
            f"convert each on its own, beginning with {first}"
        )
    return folders


def _files_below(folder: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Regular files in `folder` and below, links followed, in alphabetical order; no hidden ones."""
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=_raise):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if name.startswith("."):
                continue
            path = os.path.join(parent, name)
            try:
                stat = os.stat(path)
            except OSError as error:
                raise DataError(
                    f"{path} cannot be read: {error.strerror}; remove it, or repair the link"
                ) from None
            if os.path.isfile(path):
                yield path, stat


def _raise(error: OSError) -> None:
    raise DataError(f"{error.filename} cannot be read: {error.strerror}")
