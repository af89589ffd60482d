"""Tiny data sets in every form the real ones come in, written without any help of the code under test."""

import hashlib
import io
import json
import pickle
import tarfile
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from datasets_prep.cifar import Batch, LabelField, Release

PurePythonPickler: Any = pickle._Pickler  # pyright: ignore[reportAttributeAccessIssue]


class Python2Pickler(PurePythonPickler):
    """Writes text and bytes alike as the byte strings of Python 2, as the published files have them."""

    dispatch: ClassVar[dict[Any, Any]] = dict(PurePythonPickler.dispatch)

    def save_byte_string(self, value: str | bytes) -> None:
        data = value.encode("latin1") if isinstance(value, str) else value
        self.write(pickle.BINSTRING + len(data).to_bytes(4, "little") + data)
        self.memoize(value)

    dispatch[str] = save_byte_string
    dispatch[bytes] = save_byte_string


def python2_pickle(content: object) -> bytes:
    out = io.BytesIO()
    Python2Pickler(out, protocol=2).dump(content)
    return out.getvalue().replace(b"cnumpy._core.", b"cnumpy.core.")


@dataclass
class Tiny:
    """A release, and for each of its batches the images uint8 [N, 3, 32, 32] and labels [N, fields]."""

    release: Release
    images: dict[str, NDArray[np.uint8]]
    labels: dict[str, NDArray[np.int64]]

    def canonical(self, name: str) -> bytes:
        rows = zip(self.labels[name], self.images[name], strict=True)
        return b"".join(
            bytes(labels.tolist()) + b"".join(plane.tobytes() for plane in image) for labels, image in rows
        )

    def write_binary(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name in self.images:
            (folder / f"{name}.bin").write_bytes(self.canonical(name))

    def write_python(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name, images in self.images.items():
            content = {"data": images.reshape(len(images), -1), "batch_label": name}
            for column, field in enumerate(self.release.label_fields):
                content[field.key] = self.labels[name][:, column].tolist()
            (folder / name).write_bytes(python2_pickle(content))

    def write_npm(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name, images in self.images.items():
            sheet = Image.new("RGB", (1024, len(images)))
            for row, image in enumerate(images):
                for column, pixel in enumerate(image.reshape(3, -1).T.tolist()):
                    sheet.putpixel((column, row), tuple(pixel))
            sheet.save(folder / f"{name}.png")
        train = [label for batch in self.release.train for label in self.labels[batch.name][:, 0].tolist()]
        (folder / "train_lables.json").write_text(json.dumps(train))
        test = self.labels[self.release.test.name][:, 0].tolist()
        (folder / "test_lables.json").write_text(json.dumps(test))
        (folder / "package.json").write_text('{"name": "tiny-sheets", "version": "1.0.0"}')


def make_tiny(seed: int = 0, fields: int = 1) -> Tiny:
    """Three training files of 3, 2 and 4 records and a test file of 5; `fields` labels a record."""
    rng = np.random.default_rng(seed)
    label_fields = (LabelField("coarse_labels", 20), LabelField("fine_labels", 100))[-fields:]
    sizes = {"data_batch_1": 3, "data_batch_2": 2, "data_batch_3": 4, "test_batch": 5}
    images = {name: rng.integers(0, 256, (count, 3, 32, 32), np.uint8) for name, count in sizes.items()}
    labels = {
        name: np.stack([rng.integers(0, field.classes, count) for field in label_fields], axis=1)
        for name, count in sizes.items()
    }
    release = Release(
        name="tiny",
        folder="tiny-bin",
        label_fields=label_fields,
        train=(),
        test=Batch("", 0, ""),
        archives=(),
        npm_package="tiny-sheets@1.0.0" if fields == 1 else None,
    )
    tiny = Tiny(release, images, labels)
    batches = [
        Batch(name, count, hashlib.sha1(tiny.canonical(name)).hexdigest()) for name, count in sizes.items()
    ]
    return Tiny(replace(release, train=tuple(batches[:-1]), test=batches[-1]), images, labels)


def tar_gz(folder: Path, archive: Path, level: int = 1) -> Path:
    with tarfile.open(archive, "w:gz", compresslevel=level) as tar:
        tar.add(folder, folder.name)
    return archive


def zipped(folder: Path, archive: Path) -> Path:
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as out:
        for path in sorted(folder.iterdir()):
            out.write(path, f"{folder.name}/{path.name}")
    return archive


def tree(folder: Path) -> list[str]:
    """Everything below `folder` but the lock files, which stay for good."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.suffix != ".lock")
