"""`pcl-fast convert KIND SRC DST`: a data set becomes a .beton file and its manifest."""

import functools
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

from datasets_prep.conversion.codec import ImageOptions, Mode
from datasets_prep.conversion.progress import format_seconds, image_progress
from datasets_prep.convert import ConvertOptions, convert
from datasets_prep.listings.cifar import list_cifar
from datasets_prep.listings.imagenet import list_imagenet
from datasets_prep.listings.listing import Listing, list_folder
from pcl_fast.commands.flags import one_line
from pcl_fast.errors import ConfigError, did_you_mean
from pcl_fast.manifest import Manifest

DEFAULTS = ImageOptions()
Source = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SRC")]
Destination = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DST")]


@dataclass(frozen=True, kw_only=True)
class RunFlags:
    """Flags of every conversion."""

    workers: int = 0
    """Processes that decode; 0: one for each core"""
    max_bad: int = 0
    """Images that may be left out because they cannot be decoded; if there are more, no file is made"""
    image_timeout: float = 120.0
    """Seconds after which an image counts as one that cannot be decoded"""
    page_size: int = 0
    """MiB of a page of the file, a power of two; 0: 8, or more where images may be larger"""
    overwrite: bool = False
    """Replace a file that is there, once the new one is whole"""


@dataclass(frozen=True, kw_only=True)
class ImageFlags(RunFlags):
    """Flags of conversions of image files."""

    max_side: int = DEFAULTS.max_side
    """Shrink images whose longer side has more pixels than this (FFCV's max_resolution); 0: never"""
    quality: int = DEFAULTS.quality
    """Of JPEGs that have to be made; those that need no change keep their bytes"""
    mode: Mode = DEFAULTS.mode
    """jpg: JPEGs; raw: pixels; smart: pixels up to the smart threshold, JPEGs above"""
    smart_threshold: int = DEFAULTS.smart_threshold
    """Bytes of pixels (3 x height x width) up to which mode smart stores pixels"""


@dataclass(frozen=True, kw_only=True)
class FolderArguments(ImageFlags):
    """Convert a folder that has one folder a class, with images in it."""

    src: Source
    """The folder"""
    dst: Destination
    """The file to make, as train.beton"""

    def jobs(self) -> list[tuple[Listing, Path]]:
        """What to convert, and to where."""
        return [(list_folder(self.src), self.dst)]


@dataclass(frozen=True, kw_only=True)
class ImagenetArguments(ImageFlags):
    """Convert ImageNet from the official tar files (which are not unpacked) or from folders."""

    src: Source
    """Folder with ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar, or with train/ and val/"""
    dst: Destination
    """The file to make; without --split a folder, in which train.beton and val.beton are made"""
    split: Literal["train", "val"] | None = None
    """Which images; both, if not given"""
    labels: Path | None = None
    """Ground truth of the validation images, if it is not in SRC: the devkit, or a text file"""

    def jobs(self) -> list[tuple[Listing, Path]]:
        """What to convert, and to where."""
        if self.split:
            return [(list_imagenet(self.src, self.split, self.labels), self.dst)]
        if self.dst.suffix == ".beton":
            raise ConfigError(
                f"{self.dst} is one file: give --split train or --split val, or a folder for both"
            )
        return [
            (list_imagenet(self.src, split, self.labels), self.dst / f"{split}.beton")
            for split in ("train", "val")
        ]


@dataclass(frozen=True, kw_only=True)
class CifarFlags(RunFlags):
    """Flags of conversions of CIFAR, which is stored as pixels."""

    dst: Destination
    """The file to make, as train.beton"""
    split: Literal["train", "test"] = "train"
    """Which images"""
    root: Path | None = None
    """Folder it was fetched to, if not the user's data folder"""


class Cifar10Arguments(CifarFlags):
    """Convert the fetched CIFAR-10."""

    def jobs(self) -> list[tuple[Listing, Path]]:
        """What to convert, and to where."""
        return [(list_cifar("cifar10", self.split, self.root), self.dst)]


class Cifar100Arguments(CifarFlags):
    """Convert the fetched CIFAR-100."""

    def jobs(self) -> list[tuple[Listing, Path]]:
        """What to convert, and to where."""
        return [(list_cifar("cifar100", self.split, self.root), self.dst)]


KINDS = {
    "imagefolder": FolderArguments,
    "imagenet": ImagenetArguments,
    "cifar10": Cifar10Arguments,
    "cifar100": Cifar100Arguments,
}
Arguments = FolderArguments | ImagenetArguments | Cifar10Arguments | Cifar100Arguments


def main(words: Sequence[str]) -> None:
    """Convert, and say what was made."""
    if words and not words[0].startswith("-") and words[0] not in KINDS:
        hint = did_you_mean(words[0], KINDS) or f" There are: {', '.join(KINDS)}."
        raise ConfigError(f"unknown kind '{words[0]}'.{hint}")
    with one_line(words, "pcl-fast convert"):
        arguments: Arguments = tyro.extras.subcommand_cli_from_dict(
            KINDS, args=words, prog="pcl-fast convert"
        )
    options = _options(arguments)
    made = [convert_one(listing, path.expanduser(), options) for listing, path in arguments.jobs()]
    print_next(made)


def convert_one(listing: Listing, path: Path, options: ConvertOptions) -> Path:
    """One conversion, with what it says before, meanwhile and afterwards."""
    say = Console(stderr=True, highlight=False, markup=False, soft_wrap=True).print
    say(f"{listing.title}: {len(listing):,} images in {len(listing.classes):,} classes -> {path}")
    if listing.ignored:
        count = len(listing.ignored)
        which = "file is no image and is" if count == 1 else "files are no images and are"
        say(f"{count:,} {which} left alone: {listing.ignored[0]}{', ...' if count > 1 else ''}")
    started = time.monotonic()
    manifest = convert(listing, path, options, say, functools.partial(image_progress, "converting"))
    for line in summary(manifest, path, time.monotonic() - started):
        sys.stdout.write(line + "\n")
    return path


def summary(manifest: Manifest, path: Path, seconds: float) -> list[str]:
    """What was made, in two lines."""
    filled = sum(count > 0 for count in manifest.class_counts)
    empty = f" ({len(manifest.classes) - filled:,} without images)" if filled < len(manifest.classes) else ""
    how = ", ".join(f"{count:,} {name}" for name, count in manifest.stored.items() if count)
    bad = len(manifest.quarantine)
    left_out = f", {bad:,} left out (see {path}.quarantine.txt)" if bad else ""
    return [
        f"{path}: {manifest.num_samples:,} images in {len(manifest.classes):,} classes{empty}, "
        f"{manifest.file_size / 1e6:,.1f} MB, in {format_seconds(seconds)}",
        f"  {how}{left_out}",
    ]


def print_next(made: Sequence[Path]) -> None:
    """What to type next."""
    for path in made:
        words = ["pcl-fast", "verify", str(path), "--sheet", str(path.with_suffix(".png"))]
        sys.stdout.write(f"next:  {shlex.join(words)}\n")


def _options(arguments: Arguments) -> ConvertOptions:
    image = ImageOptions()
    if isinstance(arguments, ImageFlags):
        image = ImageOptions(
            mode=arguments.mode,
            max_side=arguments.max_side,
            quality=arguments.quality,
            smart_threshold=arguments.smart_threshold,
        )
    return ConvertOptions(
        image=image,
        workers=arguments.workers,
        max_bad=arguments.max_bad,
        image_timeout=arguments.image_timeout,
        page_size=arguments.page_size << 20,
        overwrite=arguments.overwrite,
    )
