"""What is known of a .beton file besides its content: classes, checksums, origin. Kept beside it, as JSON."""

import base64
import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pcl_fast.beton import BetonFile, open_beton
from pcl_fast.errors import DataError

FORMAT = 1
SUFFIX = ".manifest.json"


@dataclass(frozen=True, slots=True)
class Quarantined:
    """An image that was left out: its path within the source, and why."""

    path: str
    reason: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Manifest:
    """The manifest of one file.

    `classes` are names in the order of labels, `class_counts` their samples. `checksums_N` are the
    CRC-32s of each sample's stored bytes (uint32), `structure_crc32` is that of all other bytes.
    `source_digest` is a SHA-256 over path, size and content checksum of every image of the source.
    `stored` counts the images by what was done with them. Nothing in it depends on when, where or
    with how many workers the file was made.
    """

    num_samples: int
    file_size: int
    page_size: int
    classes: tuple[str, ...]
    class_counts: tuple[int, ...]
    source: str
    source_digest: str
    options: Mapping[str, int | str]
    stored: Mapping[str, int]
    versions: Mapping[str, str]
    structure_crc32: int
    quarantine: tuple[Quarantined, ...]
    checksums_N: NDArray[np.uint32]

    def check(self, beton: BetonFile, sample: int) -> None:
        """DataError if the stored bytes of a sample are no longer what was written."""
        if beton.checksum(sample) != int(self.checksums_N[sample]):
            raise damaged_sample(beton, sample, "its checksum is wrong")

    def to_json(self) -> str:
        """As text, a key a line."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        fields["quarantine"] = [dataclasses.asdict(bad) for bad in self.quarantine]
        fields["checksums_N"] = base64.b64encode(self.checksums_N.astype("<u4").tobytes()).decode()
        lines = [
            f"{json.dumps(key)}: {json.dumps(value)}" for key, value in {"format": FORMAT, **fields}.items()
        ]
        return "{\n" + ",\n".join(lines) + "\n}\n"


def manifest_path(beton_path: Path | str) -> Path:
    """Where the manifest of a file lies."""
    return Path(f"{beton_path}{SUFFIX}")


def read_manifest(beton_path: Path | str) -> Manifest | None:
    """The manifest beside a file, or None if there is none; DataError if it cannot be read."""
    path = manifest_path(beton_path)
    try:
        return _parse(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} is not a readable manifest ({type(error).__name__}: {error}); convert again, "
            "or delete it to use the file without checksums"
        ) from error


def open_with_manifest(path: Path | str) -> tuple[BetonFile, Manifest | None]:
    """A file and its manifest; DataError if either is damaged or they do not belong together."""
    beton, manifest = open_beton(path), read_manifest(path)
    if manifest is None:
        return beton, None
    facts = (manifest.num_samples, manifest.file_size, manifest.page_size, manifest.structure_crc32)
    if facts != (beton.num_samples, beton.file_size, beton.page_size, beton.structure_crc32):
        raise DataError(
            f"{path} is not the file that {manifest_path(path).name} describes (its labels or its index "
            "have changed, or one of the two is of another conversion); make it again with `pcl-fast convert`"
        )
    if int(beton.labels_N.max()) >= len(manifest.classes):
        raise DataError(
            f"{path}: sample {int(beton.labels_N.argmax())} has the label {int(beton.labels_N.max())}, but "
            f"there are {len(manifest.classes)} classes; make it again with `pcl-fast convert`"
        )
    return beton, manifest


def damaged_sample(beton: BetonFile, sample: int, why: str) -> DataError:
    """The error for a sample that cannot be used."""
    return DataError(
        f"{beton.path}: sample {sample} is damaged ({why}); "
        f"`pcl-fast verify {beton.path}` lists every such sample"
    )


def _parse(content: dict[str, Any]) -> Manifest:
    if content.pop("format") != FORMAT:
        raise ValueError(f"its format is not {FORMAT}")
    checksums = np.frombuffer(base64.b64decode(content.pop("checksums_N"), validate=True), "<u4")
    quarantine = tuple(Quarantined(**bad) for bad in content.pop("quarantine"))
    classes, counts = (tuple(content.pop(key)) for key in ("classes", "class_counts"))
    manifest = Manifest(
        **content,
        classes=classes,
        class_counts=counts,
        quarantine=quarantine,
        checksums_N=checksums.astype(np.uint32),
    )
    if len(checksums) != manifest.num_samples or len(classes) != len(counts):
        raise ValueError("its lists have the wrong lengths")
    return manifest
