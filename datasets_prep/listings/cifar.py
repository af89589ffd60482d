"""The images of a fetched CIFAR data set, for a conversion."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np

from datasets_prep.cifar import IMAGE_BYTES, Release, cache_folder, find_damage, release_named
from datasets_prep.listings.listing import Item, Listing, Place, make_listing
from pcl_fast.errors import DataError

CIFAR10_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck"
CIFAR100_CLASSES = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can
castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin
elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster
man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck
pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk
skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger
tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
"""
CLASSES = {"cifar10": CIFAR10_CLASSES, "cifar100": CIFAR100_CLASSES}


def list_cifar(name: str, split: Literal["train", "test"], data_dir: Path | None = None) -> Listing:
    """The images of `cifar10` or `cifar100` in the order of the release.

    DataError, naming the command that fetches it, if it is not there or not as published.
    """
    release = release_named(name)
    folder = cache_folder(data_dir) / release.folder
    if problem := find_damage(release, folder, verify=False):
        raise DataError(f"{name}: {problem}; run `pcl-fast fetch {name}`")
    classes = tuple(CLASSES[name].split())
    listing = make_listing(f"{name} {split}", classes, _items(release, split, folder))
    return replace(listing, codec="planes")


def _items(release: Release, split: str, folder: Path) -> Iterator[Item]:
    for batch in release.train if split == "train" else (release.test,):
        path = folder / batch.file
        stamp = path.stat().st_mtime_ns
        records = np.fromfile(path, np.uint8).reshape(batch.records, release.record_bytes)
        labels = records[:, -IMAGE_BYTES - 1].tolist()
        if max(labels) >= release.num_classes:
            raise DataError(
                f"{path} holds the label {max(labels)}, classes end at {release.num_classes - 1}; "
                f"delete it and run `pcl-fast fetch {release.name}`"
            )
        for number, label in enumerate(labels):
            offset = (number + 1) * release.record_bytes - IMAGE_BYTES
            yield Item(f"{batch.file}/{number:05}", label, Place(str(path), offset, IMAGE_BYTES), stamp)
