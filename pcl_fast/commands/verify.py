"""`pcl-fast verify FILE`: is a .beton file whole, and can every image of it be decoded?"""

import functools
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from datasets_prep.contact_sheet import contact_sheet
from datasets_prep.conversion.progress import image_progress
from datasets_prep.verify import verify
from pcl_fast import atomic
from pcl_fast.beton import open_beton
from pcl_fast.commands.flags import read_flags
from pcl_fast.errors import ConfigError, DataError
from pcl_fast.manifest import read_manifest

SHEET_ENDINGS = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True, kw_only=True)
class VerifyArguments:
    """Check structure, labels and checksums of a .beton file, and decode every image of it."""

    dst: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FILE")]
    """The file"""
    sheet: Path | None = None
    """Make a contact sheet of up to 64 images with the names of their classes: a .png"""
    workers: int = 0
    """Threads that decode; 0: one for each core"""


def main(words: Sequence[str]) -> None:
    """Verify; DataError after the list of what is wrong."""
    arguments = read_flags(VerifyArguments, words, "pcl-fast verify")
    if arguments.workers < 0:
        raise ConfigError(f"--workers {arguments.workers}: give 0 or more")
    if arguments.sheet and arguments.sheet.suffix.lower() not in SHEET_ENDINGS:
        raise ConfigError(f"--sheet {arguments.sheet}: give a name that ends with .png")
    path = arguments.dst.expanduser()
    workers = arguments.workers or len(os.sched_getaffinity(0))
    found = verify(path, workers, functools.partial(image_progress, "verifying"))
    if arguments.sheet:
        write_sheet(path, arguments.sheet.expanduser())
    say = Console(highlight=False, markup=False, soft_wrap=True).print
    for problem in found.problems:
        say(problem)
    if found.problems:
        raise DataError(
            f"{path} has {len(found.problems):,} problem{'s' * (len(found.problems) > 1)}, listed above; "
            "make it again with `pcl-fast convert`, or get it again"
        )
    classes = f" in {found.num_classes:,} classes" if found.num_classes else ""
    what = "structure, labels, checksums and every image are right"
    if not found.has_manifest:
        what = (
            "structure and every image are right; without a manifest beside it, checksums cannot be checked"
        )
    say(f"{path}: {found.num_samples:,} images{classes}, {found.file_size / 1e6:,.1f} MB: {what}")


def write_sheet(path: Path, sheet: Path) -> None:
    """Put a contact sheet of the file `path` into the file `sheet`."""
    with open_beton(path) as beton:
        image = contact_sheet(beton, read_manifest(path))
    with atomic.replacing(sheet) as temporary, temporary.open("wb") as file:
        image.save(file, "JPEG" if sheet.suffix.lower() in (".jpg", ".jpeg") else sheet.suffix[1:].upper())
    sys.stdout.write(f"{sheet}: {image.width} x {image.height} pixels\n")
