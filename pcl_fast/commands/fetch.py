"""`pcl-fast fetch NAME [--source DIR_OR_ARCHIVE]`: get a data set."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from datasets_prep.fetch import fetch
from pcl_fast.commands.flags import read_flags


@dataclass(frozen=True)
class FetchArguments:
    """Get CIFAR-10 or CIFAR-100, whole and checked, into the user's data folder (or PCL_FAST_DATA)."""

    name: tyro.conf.Positional[str]
    """cifar10 or cifar100"""
    source: Annotated[Path | None, tyro.conf.arg(metavar="DIR_OR_ARCHIVE")] = None
    """A folder or archive that has it in the official binary or Python form; else it is downloaded."""
    root: Path | None = None
    """Folder to put it into, instead of the user's data folder."""


def main(words: Sequence[str]) -> None:
    """Fetch the data set."""
    arguments = read_flags(FetchArguments, words, "pcl-fast fetch")
    fetch(arguments.name, arguments.source, arguments.root)
