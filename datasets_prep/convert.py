"""A listing of images becomes a .beton file and its manifest: in parallel, in order, resumable, whole.

Workers decode; this process only places samples one after the other and keeps the journal. The file is
the same, byte for byte, for any number of workers, and after any number of interruptions.
"""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from datasets_prep.conversion.codec import ImageOptions
from datasets_prep.conversion.finish import finish
from datasets_prep.conversion.quarantine import write_quarantine
from datasets_prep.conversion.run import Run, RunOptions
from datasets_prep.conversion.space import check_space
from datasets_prep.conversion.state import BAD, STORED, UNREAD, ConversionState
from datasets_prep.conversion.writer import PAGE_SIZE, Layout, page_size_for
from datasets_prep.listings.listing import Listing
from pcl_fast.beton import MAX_PAGE_SIZE, MIN_PAGE_SIZE
from pcl_fast.errors import ConfigError, DataError
from pcl_fast.manifest import Manifest, Quarantined

Report = Callable[[str], None]
Progress = Callable[[int, int], AbstractContextManager[Callable[[int], None]]]
"""Called with the images done already and those in all; yields what is called with those done now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertOptions:
    """How to convert.

    `workers` 0: one a core. `max_bad`: images that may be left out. `image_timeout` in seconds.
    `page_size` in bytes, 0: FFCV's default, or more where images may be larger. `overwrite`: replace
    a file that is there, once the new one is whole.
    """

    image: ImageOptions = field(default_factory=ImageOptions)
    workers: int = 0
    max_bad: int = 0
    image_timeout: float = 120.0
    page_size: int = 0
    overwrite: bool = False

    def __post_init__(self) -> None:
        image = self.image
        for flag, value, low, high in (
            ("--workers", self.workers, 0, 1024),
            ("--max-bad", self.max_bad, 0, None),
            ("--max-side", image.max_side, 0, 65535),
            ("--quality", image.quality, 1, 100),
            ("--smart-threshold", image.smart_threshold, 0, None),
        ):
            if value < low or (high is not None and value > high):
                raise ConfigError(
                    f"{flag} {value}: give {low} to {high}" if high else f"{flag} {value}: give {low} or more"
                )
        if not self.image_timeout > 0:
            raise ConfigError(f"--image-timeout {self.image_timeout:g}: give a positive number of seconds")
        size = self.page_size
        if size and not (MIN_PAGE_SIZE <= size <= MAX_PAGE_SIZE and size & (size - 1) == 0):
            raise ConfigError(
                f"--page-size {size >> 20}: give a power of two from 2 to {MAX_PAGE_SIZE >> 20} (MiB)"
            )


def convert(
    listing: Listing, destination: Path, options: ConvertOptions, report: Report, progress: Progress
) -> Manifest:
    """Make `destination` from the images of `listing`; returns its manifest.

    Until everything is written and on the disk, nothing is under the final name; what is done meanwhile
    is kept beside it, and the same call goes on from there. ConfigError if the file is there already.
    DataError with the list of bad images if they are more than `max_bad`; PclError if a worker dies or
    the disk is full; Preempted if the process was asked to stop.
    """
    destination = destination.expanduser()
    if not len(listing):
        raise DataError(f"{listing.title}: there are no images to convert")
    _check_destination(destination, options.overwrite)
    state = ConversionState(destination, listing)
    try:
        page_size = options.page_size or _page_size(listing, options.image)
        plan = plan_of(listing, options.image, page_size)
        state.resume(plan, report)
        check_space(state, options.image)
        run = RunOptions(
            image=options.image,
            page_size=page_size,
            workers=min(options.workers or len(os.sched_getaffinity(0)), len(listing)),
            image_timeout=options.image_timeout,
        )
        Run(state, run).to_end(progress)
        bad = _judge(state, options.max_bad, report)
        return finish(state, plan, bad, page_size)
    finally:
        state.close()


def plan_of(listing: Listing, image: ImageOptions, page_size: int) -> dict[str, Any]:
    """What the bytes of the file depend on, besides the images."""
    from PIL import __version__ as pillow
    from PIL import features

    from pcl_fast import __version__

    used = asdict(image) if listing.codec == "image" else {"mode": "raw"}
    if image.mode != "smart":
        used.pop("smart_threshold", None)
    if image.mode == "raw":
        used.pop("quality", None)
    return {
        "options": {**used, "page_size": page_size},
        "versions": {
            "pcl_fast": __version__,
            "pillow": pillow,
            "libjpeg_turbo": str(features.version("libjpeg_turbo")),
        },
        # Where the data begin depends on the number of images; labels on the classes.
        "start": Layout(len(listing), page_size).position,
        "classes": list(listing.classes),
        "codec": listing.codec,
    }


def _check_destination(destination: Path, overwrite: bool) -> None:
    if destination.is_dir():
        raise ConfigError(
            f"{destination} is a folder; give the name of the file to make, as {destination}.beton"
        )
    if destination.exists() and not overwrite:
        raise ConfigError(f"{destination} exists already; delete it, or give --overwrite to replace it")
    folder = destination.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be made: {error.strerror}; give another place") from None
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"{folder} may not be written to; give another place")


def _page_size(listing: Listing, image: ImageOptions) -> int:
    """Enough for any image of `max_side`; else for the largest file."""
    largest = 4 * image.max_side**2 if image.max_side else int(listing.sizes_N.max())
    return page_size_for(largest) or PAGE_SIZE


def _judge(state: ConversionState, max_bad: int, report: Report) -> tuple[Quarantined, ...]:
    """The images that are left out; DataError if they are too many."""
    bad = np.flatnonzero(np.isin(state.records_N["status"], (BAD, UNREAD)))
    listed = tuple(Quarantined(_printable(state.listing.names[i]), state.reasons[int(i)]) for i in bad)
    path = write_quarantine(state.destination, listed, report)
    good = int((state.records_N["status"] == STORED).sum())
    if len(listed) <= max_bad and good:
        return listed
    advice = f"leave them out with --max-bad {len(listed)}" if good else "there is nothing else in the source"
    raise DataError(
        f"{len(listed):,} of {len(state.listing):,} images cannot be used (--max-bad is {max_bad:,}), "
        f"see {path}: repair them, or {advice}; the others are kept, converted, in {state.folder}, "
        "and running again goes on from there"
    )


def _printable(name: str) -> str:
    """A path as text, also if it is no UTF-8."""
    return name.encode(errors="backslashreplace").decode()
