"""The images of ImageNet (ILSVRC 2012) as people have them: the official tar files, or folders.

Tar files are not unpacked: where each image lies in them is noted, also in the tar of tars of training
images. Labels are the places of the WordNet ids in alphabetical order, as everywhere.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from datasets_prep.listings.imagenet_labels import (
    KNOWN_FILES,
    WNID,
    GroundTruth,
    find_ground_truth,
    read_ground_truth,
)
from datasets_prep.listings.listing import EXTENSIONS, Item, Listing, Place, list_folder, make_listing
from datasets_prep.listings.tar_index import Member, members
from pcl_fast.errors import DataError

Split = Literal["train", "val"]
TARS = {"train": "ILSVRC2012_img_train.tar", "val": "ILSVRC2012_img_val.tar"}
BELOW = ("", "ILSVRC", "ILSVRC/Data/CLS-LOC", "Data/CLS-LOC")  # as Kaggle packs it
ClassTars = dict[str, tuple[Path, Member | None]]


def list_imagenet(source: Path, split: Split, labels: Path | None = None) -> Listing:
    """The images of a split, by class and name (training) or by name (validation).

    `source` holds the split's tar file or its folder. Validation images that are not in a folder each
    class need a ground truth: `labels`, or a known file in `source`. DataError, with what was looked
    for, if something is not there or damaged.
    """
    source = source.expanduser()
    roots = [source / below for below in BELOW if (source / below).is_dir()]
    if not roots:
        raise DataError(f"{source} is not a folder; give the one that has {TARS[split]}, or {split}/")
    found, title = _find(roots, split), f"ImageNet {split}"
    if found is None:
        raise DataError(f"{source} has neither {TARS[split]} nor a folder {split}/, nor Kaggle's folders")
    classes = _known_classes(roots)
    if _has_class_folders(found):
        return list_folder(found, classes or None, title)
    if split == "train":
        return make_listing(title, classes, _train_items(_class_tars(found)))
    truth = _ground_truth(source, roots, labels, classes)
    classes = classes or truth.classes
    return make_listing(title, classes, _val_items(found, truth, classes))


def _find(roots: list[Path], split: Split) -> Path | None:
    """The folder or the tar file of a split."""
    places = [root / name for name in (split, TARS[split]) for root in roots]
    return next((place for place in places if place.exists()), None)


def _has_class_folders(place: Path) -> bool:
    return place.is_dir() and any(_is_class_folder(child) for child in place.iterdir())


def _is_class_folder(child: Path) -> bool:
    return child.is_dir() and not child.name.startswith(".")


def _known_classes(roots: list[Path]) -> tuple[str, ...]:
    """The WordNet ids of the training images, if they are there: both splits must have the same labels."""
    train = _find(roots, "train")
    if train is None:
        return ()
    if _has_class_folders(train):
        return tuple(sorted(child.name for child in train.iterdir() if _is_class_folder(child)))
    return tuple(_class_tars(train))


def _class_tars(train: Path) -> ClassTars:
    """Each class's tar: in the official tar of tars, or in a folder it was unpacked to."""
    if train.is_dir():
        found: ClassTars = {path.stem: (path, None) for path in train.glob("*.tar")}
    else:
        found = {Path(member.name).stem: (train, member) for member in members(train)}
    wrong = next((name for name in found if not WNID.fullmatch(name)), None)
    if wrong or not found:
        what = f"{wrong} in {train} is not the tar of a class" if wrong else f"{train} holds no classes"
        raise DataError(f"{what}: give the official {TARS['train']}, or a folder with one folder a class")
    return dict(sorted(found.items()))


def _train_items(tars: ClassTars) -> Iterator[Item]:
    for label, (wnid, (path, inside)) in enumerate(tars.items()):
        for member in sorted(members(path, inside), key=lambda member: member.name):
            yield _item(f"{wnid}/{Path(member.name).name}", label, path, member)


def _val_items(found: Path, truth: GroundTruth, classes: tuple[str, ...]) -> Iterator[Item]:
    label_of = {wnid: label for label, wnid in enumerate(classes)}
    for path, member in sorted(_val_members(found), key=lambda pair: pair[1].name):
        wnid = truth.wnid(member.name)
        if wnid not in label_of:
            raise DataError(f"{truth.path}: {member.name} is {wnid}, which is none of the training classes")
        yield _item(Path(member.name).name, label_of[wnid], path, member)


def _val_members(found: Path) -> Iterator[tuple[Path, Member]]:
    """Images in the tar or in the folder, with the file they are in."""
    if not found.is_dir():
        yield from ((found, member) for member in members(found))
        return
    for path in found.iterdir():
        if path.suffix.lower() in EXTENSIONS and not path.name.startswith("."):
            stat = path.stat()
            yield path, Member(path.name, 0, stat.st_size, stat.st_mtime_ns)


def _item(name: str, label: int, path: Path, member: Member) -> Item:
    return Item(name, label, Place(str(path), member.offset, member.size), member.stamp)


def _ground_truth(
    source: Path, roots: list[Path], labels: Path | None, classes: tuple[str, ...]
) -> GroundTruth:
    path = labels.expanduser() if labels else find_ground_truth(roots)
    if path is None:
        raise DataError(
            f"{source} has no ground truth of the validation images: put one of {KNOWN_FILES[0]}, "
            f"{', '.join(KNOWN_FILES[3:])} there, or give it with --labels"
        )
    return read_ground_truth(path, classes)
