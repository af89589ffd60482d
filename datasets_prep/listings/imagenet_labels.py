"""The ground truth of ImageNet's validation images, in the forms people have it."""

import io
import re
import tarfile
from collections.abc import Iterable
from pathlib import Path

from datasets_prep.listings.mat5 import read_structures
from pcl_fast.errors import DataError

GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
META = "meta.mat"
# In the order in which they are looked for; the devkit as the archive, or unpacked.
KNOWN_FILES = (
    "ILSVRC2012_devkit_t12.tar.gz",
    "ILSVRC2012_devkit_t12/data/" + GROUND_TRUTH,
    "data/" + GROUND_TRUTH,
    GROUND_TRUTH,
    "LOC_val_solution.csv",
    "imagenet_2012_validation_synset_labels.txt",
    "val.txt",
)
WNID = re.compile(r"n\d{8}")
FORMS = (
    "known forms: the devkit; Kaggle's LOC_val_solution.csv; lines of FILE WNID or of FILE LABEL; "
    "or one WNID a line, in the order of the files"
)


class GroundTruth:
    """Says the WordNet id of a validation image; `classes` are all ids that occur, sorted."""

    def __init__(self, path: Path, by_name: dict[str, str], by_number: list[str]) -> None:
        self.path, self.by_name, self.by_number = path, by_name, by_number
        self.classes = tuple(sorted(set(by_name.values()) | set(by_number)))

    def wnid(self, name: str) -> str:
        """The id of the image `name`; DataError if there is none."""
        stem = Path(name).stem
        if found := self.by_name.get(stem):
            return found
        digits = re.search(r"(\d+)$", stem)
        if digits and 1 <= int(digits[1]) <= len(self.by_number):
            return self.by_number[int(digits[1]) - 1]
        raise DataError(f"{self.path} says nothing of {name}; give the right file with --labels")


def find_ground_truth(folders: Iterable[Path]) -> Path | None:
    """The first known file in any of the folders."""
    return next(
        (path for folder in folders for file in KNOWN_FILES if (path := folder / file).is_file()), None
    )


def read_ground_truth(path: Path, classes: tuple[str, ...]) -> GroundTruth:
    """Read any of the forms; `classes` are the WordNet ids in the order of labels, if they are known.

    DataError, with the forms that are known, if it is none of them or damaged.
    """
    try:
        if path.is_dir():
            return read_ground_truth(path / "data" / GROUND_TRUTH, classes)
        if path.name.endswith((".tar.gz", ".tgz", ".tar")):
            text, meta = _from_devkit(path)
        else:
            beside = path.with_name(META)
            text, meta = path.read_text(), beside.read_bytes() if beside.is_file() else None
        return _parse(path, text, meta, classes)
    except (OSError, ValueError, tarfile.TarError, EOFError) as error:
        raise DataError(f"{path} is not a ground truth of ImageNet: {error}; {FORMS}") from error


def _parse(path: Path, text: str, meta: bytes | None, classes: tuple[str, ...]) -> GroundTruth:
    rows = [line.replace(",", " ").split() for line in text.splitlines() if line.strip()]
    if rows and rows[0][0] == "ImageId":
        rows = rows[1:]
    if not rows:
        raise ValueError("it is empty")
    if len(rows[0]) == 1:
        numbered = rows[0][0].isdigit()
        id_to_wnid = _synsets(meta) if numbered else {}
        by_number = [_known(row[0], id_to_wnid) if numbered else _checked(row[0]) for row in rows]
        return GroundTruth(path, {}, by_number)
    if rows[0][1].isdigit():
        if not classes:
            raise ValueError(
                "it has labels as numbers, but the classes are not known without the training images"
            )
        labels = {str(label): wnid for label, wnid in enumerate(classes)}
        return GroundTruth(path, {Path(row[0]).stem: _known(row[1], labels) for row in rows}, [])
    return GroundTruth(path, {Path(row[0]).stem: _checked(row[1]) for row in rows}, [])


def _known(number: str, wnids: dict[str, str]) -> str:
    if number not in wnids:
        raise ValueError(f"'{number}' is not the number of a class")
    return wnids[number]


def _checked(word: str) -> str:
    if not WNID.fullmatch(word):
        raise ValueError(f"'{word}' is not a WordNet id such as n01440764")
    return word


def _synsets(meta: bytes | None) -> dict[str, str]:
    """ILSVRC2012_ID to WordNet id, of the classes (which have no children)."""
    if meta is None:
        raise ValueError(f"its numbers mean nothing without {META} of the devkit beside it")
    leaves = [row for row in read_structures(meta) if not row.get("num_children")]
    return {str(int(row["ILSVRC2012_ID"])): _checked(row["WNID"]) for row in leaves}


def _from_devkit(path: Path) -> tuple[str, bytes]:
    found: dict[str, bytes] = {}
    with tarfile.open(path) as archive:
        for member in archive:
            name = Path(member.name).name
            if name in (GROUND_TRUTH, META) and member.isfile():
                found[name] = (archive.extractfile(member) or io.BytesIO()).read()
    if missing := {GROUND_TRUTH, META} - set(found):
        raise ValueError(f"{missing.pop()} is missing in it")
    return found[GROUND_TRUTH].decode(), found[META]
