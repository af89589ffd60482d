"""Where encoded images and their labels come from: a folder of image files, or a .beton file."""

import io
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

from pcl_fast.beton import RAW
from pcl_fast.errors import DataError
from pcl_fast.manifest import damaged_sample, open_with_manifest

SPLITS = {"train", "val", "test"}


@dataclass(frozen=True, slots=True)
class ClassList:
    """How many classes a data set has, and their names in the order of labels, if it tells them.

    `fingerprint` tells one .beton file from another: a checksum of its labels and its index. A folder
    has none.
    """

    number: int
    names: tuple[str, ...] | None
    fingerprint: str | None = None


class ImageSource(Protocol):
    """Images that can be read one by one, by any number of processes.

    `labels_N` is int64. `page_of_N` says on which page of the file a sample lies, None of a folder.
    """

    path: Path
    labels_N: NDArray[np.int64]
    page_of_N: NDArray[np.integer] | None

    def damaged(self, sample: int, why: str) -> DataError:
        """The error for a sample that cannot be used."""
        ...

    def read(self, sample: int) -> bytes | memoryview:
        """The bytes of the image: a file's, or of a sample's JPEG or raw pixels.

        Raises:
            DataError: if they cannot be read, or are not those that were written.
        """
        ...

    def open(self, sample: int) -> Image.Image:
        """The image, not decoded yet.

        Raises:
            DataError: as `read`, or if it is none.
        """
        ...


def open_images(path: Path) -> ImageSource:
    """The images of a folder with a subfolder for each class, or of a .beton file.

    Raises:
        DataError: if there are none, or something else, or they are damaged in a way that shows now.
    """
    if path.is_dir():
        return ImageFolder(path)
    return BetonImages(path)


def list_classes(path: Path) -> ClassList:
    """The classes of a folder, without looking at its images, or of a .beton file.

    Raises:
        DataError: as `open_images`.
    """
    if path.is_dir():
        names = _class_folders(path)
        return ClassList(len(names), names)
    images = BetonImages(path)
    fingerprint = f"{images.file.structure_crc32:08x}"
    if images.manifest is not None:
        return ClassList(len(images.manifest.classes), images.manifest.classes, fingerprint)
    return ClassList(int(images.labels_N.max()) + 1, None, fingerprint)


def decode(source: ImageSource, sample: int) -> Image.Image:
    """The pixels of a sample, as PIL converts them to RGB; EXIF is ignored.

    Raises:
        DataError: naming the sample, if it cannot be read or decoded wholly.
    """
    image = source.open(sample)
    try:
        with warnings.catch_warnings():  # of odd metadata and of large images: neither changes a pixel
            warnings.simplefilter("ignore")
            return image.convert("RGB")
    except Exception as error:  # each of PIL's decoders has errors of its own
        raise source.damaged(sample, f"PIL cannot decode it: {error}") from None


class ImageFolder:
    """Files in a folder for each class, in torchvision's order; an `ImageSource`."""

    page_of_N: NDArray[np.integer] | None = None

    def __init__(self, path: Path) -> None:
        """List the files.

        Raises:
            DataError: if there are no class folders, a class has no images, or these are splits.
        """
        names = _class_folders(path)
        try:
            numbers = {name: number for number, name in enumerate(names)}
            found = make_dataset(path, numbers, extensions=IMG_EXTENSIONS)
        except FileNotFoundError as error:  # of torchvision, for classes without images
            raise DataError(f"{path}: {' '.join(str(error).split())}") from None
        self.path = path
        self.labels_N = np.array([label for _, label in found], np.int64)
        # One array of bytes: a million Python strings would be copied into every worker, page by page.
        self._files_N = np.array([os.fsencode(os.path.relpath(file, path)) for file, _ in found])

    def damaged(self, sample: int, why: str) -> DataError:
        """The error for a file that cannot be used."""
        return DataError(
            f"{self._file(sample)} is damaged ({why}); remove it, or let `pcl-fast convert imagefolder` "
            "find all that are and leave them out"
        )

    def read(self, sample: int) -> bytes:
        """The file, whole."""
        try:
            return self._file(sample).read_bytes()
        except OSError as error:
            raise DataError(f"{self._file(sample)} cannot be read: {error.strerror or error}") from None

    def open(self, sample: int) -> Image.Image:
        """The image in the file."""
        return _open(self, sample, self.read(sample))

    def _file(self, sample: int) -> Path:
        return self.path / os.fsdecode(self._files_N[sample])


class BetonImages:
    """The samples of a .beton file, each held against its checksum when first read; an `ImageSource`."""

    page_of_N: NDArray[np.integer] | None

    def __init__(self, path: Path) -> None:
        """Map the file.

        Raises:
            DataError: if it is not a whole .beton file.
        """
        self.path = path
        self.file, self.manifest = open_with_manifest(path)
        self.labels_N, self.page_of_N = self.file.labels_N, self.file.page_of_N
        self._unchecked_N = np.ones(len(self.labels_N), np.bool_)

    def damaged(self, sample: int, why: str) -> DataError:
        """The error for a sample that cannot be used."""
        return damaged_sample(self.file, sample, why)

    def read(self, sample: int) -> memoryview:
        """The sample's JPEG, or its raw pixels; not copied."""
        if self.manifest is not None and self._unchecked_N[sample]:
            self.manifest.check(self.file, sample)
            self._unchecked_N[sample] = False
        return self.file.encoded(sample)

    def open(self, sample: int) -> Image.Image:
        """The image in the sample."""
        data = bytes(self.read(sample))
        if self.file.modes_N[sample] == RAW:
            height, width = map(int, self.file.sizes_N2[sample])
            return Image.frombytes("RGB", (width, height), data)
        return _open(self, sample, data)


def _class_folders(path: Path) -> tuple[str, ...]:
    names = tuple(sorted(entry.name for entry in os.scandir(path) if entry.is_dir()))
    if not names:
        raise DataError(f"{path}: has no subfolders; give a folder with a subfolder of images for each class")
    if set(names) <= SPLITS:
        raise DataError(f"{path}: holds {' and '.join(names)}, not classes; give one of these")
    return names


def check_labels(source: ImageSource, num_classes: int) -> None:
    """Refuse labels that `num_classes` classes do not have.

    Raises:
        DataError: naming the first such sample.
    """
    outside_N = (source.labels_N < 0) | (source.labels_N >= num_classes)
    if outside_N.any():
        sample = int(outside_N.argmax())
        raise DataError(
            f"{source.path}: sample {sample} has label {source.labels_N[sample]}, "
            f"but labels of {num_classes} classes are 0 to {num_classes - 1}"
        )


def _open(source: ImageSource, sample: int, data: bytes) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Image.open(io.BytesIO(data))
    except Image.UnidentifiedImageError:
        raise source.damaged(sample, "it is not an image that PIL knows") from None
    except Exception as error:
        raise source.damaged(sample, f"PIL cannot open it: {error}") from None
