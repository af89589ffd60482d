"""Is there room for what a conversion will write? Estimated from the headers of some images."""

import io
import shutil
import warnings

import numpy as np
from PIL import Image

from datasets_prep.conversion.codec import ImageOptions, shrunk_size, stored_mode
from datasets_prep.conversion.state import ConversionState
from datasets_prep.listings.listing import Listing, Place
from pcl_fast.beton import ALLOCATION, JPG, SAMPLE
from pcl_fast.errors import PclError

EXAMPLES = 200
JPEG_BYTES_PER_PIXEL = 0.3  # photos shrunk to 500 pixels, at quality 90
DOUBT = 0.9  # an estimate is an estimate: only what is well below it is refused


def check_space(state: ConversionState, options: ImageOptions) -> None:
    """PclError if the disk has clearly less room than the images that are left will take."""
    needed = estimated_bytes(state.listing, state.done, options)
    free = shutil.disk_usage(state.folder).free
    if free < DOUBT * needed:
        raise PclError(
            f"{state.folder.parent} has {free / 1e9:.1f} GB free, about {needed / 1e9:.1f} GB are needed: "
            "make room, or store less with --max-side or --quality"
        )


def estimated_bytes(listing: Listing, first: int, options: ImageOptions) -> int:
    """About how many bytes the images from `first` on will take in the file."""
    left = len(listing) - first
    examples = (
        np.unique(np.linspace(first, len(listing) - 1, min(left, EXAMPLES)).astype(np.int64)) if left else []
    )
    if listing.codec == "planes":
        each = 3072.0
    else:
        sizes = [_stored_bytes(listing.place(int(index)), options) for index in examples]
        known = [size for size in sizes if size is not None]
        each = sum(known) / len(known) if known else 0.0
    return int(left * each) + len(listing) * (SAMPLE.itemsize + ALLOCATION.itemsize)


def _stored_bytes(place: Place, options: ImageOptions) -> float | None:
    """About what one image will take; None if that cannot be told."""
    try:
        with open(place.file, "rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            file.seek(place.offset)
            header = io.BytesIO(file.read(min(place.size, 1 << 18)))
            with Image.open(header) as image:
                size, is_jpeg = image.size, image.format in ("JPEG", "MPO")
    except Exception:  # a bad image takes no room, and the conversion will say what is wrong with it
        return None
    stored = shrunk_size(size, options.max_side)
    if stored_mode(stored, options) != JPG:
        return 3.0 * stored[0] * stored[1]
    return float(place.size) if is_jpeg and stored == size else JPEG_BYTES_PER_PIXEL * stored[0] * stored[1]
