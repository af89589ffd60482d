"""From the bytes of an image file to what is stored of it: its own bytes, a new JPEG, or raw pixels."""

import io
from dataclasses import dataclass
from typing import Literal

from PIL import Image

from datasets_prep.conversion.jpeg import JpegMarkers, read_markers
from pcl_fast.beton import JPG, RAW

Mode = Literal["jpg", "raw", "smart"]
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "DIB", "TIFF", "WEBP", "PPM", "JPEG2000", "AVIF")
# As many bytes as libjpeg reads ahead of the last pixel, at least.
READ_AHEAD = 16
MAX_PIXELS = 1 << 29  # 1.6 GB in memory; Pillow's own limit is below that of panoramas
ORIGINAL, REENCODED, PIXELS, SHRUNK = 1, 2, 4, 8


class BadImage(Exception):
    """An image that cannot be decoded; the message is the reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageOptions:
    """How images are stored.

    `max_side`: the longer side is shrunk to this many pixels, 0: never. `quality` is that of JPEGs that
    have to be made. `smart_threshold`: in mode "smart", bytes of pixels up to which an image is raw.
    """

    mode: Mode = "jpg"
    max_side: int = 500
    quality: int = 90
    smart_threshold: int = 256 * 256 * 3


@dataclass(frozen=True, slots=True)
class StoredImage:
    """What is stored; `mode` is JPG or RAW, `how` a sum of ORIGINAL, REENCODED, PIXELS, SHRUNK."""

    mode: int
    width: int
    height: int
    data: bytes
    how: int


def store_image(data: bytes, options: ImageOptions) -> StoredImage:
    """Decode the file `data` fully, and say what to store; BadImage, with the reason, if it cannot be.

    A JPEG that every decoder reads and that needs no shrinking keeps its bytes. Everything else becomes
    RGB as by PIL's `convert("RGB")`; EXIF, its orientation too, is ignored. Pillow warns of much that
    does no harm (corrupt EXIF, palettes): callers silence it.
    """
    markers = read_markers(data)
    image = decode_image(data, markers)
    size = shrunk_size(image.size, options.max_side)
    shrunk = SHRUNK if size != image.size else 0
    mode = stored_mode(size, options)
    if mode == JPG and markers is not None and markers.is_plain and not shrunk:
        return StoredImage(JPG, *size, data, ORIGINAL)
    rgb = _to_rgb(image)
    if shrunk:
        rgb = rgb.resize(size, Image.Resampling.BICUBIC)
    if mode == RAW:
        return StoredImage(RAW, *size, rgb.tobytes(), PIXELS | shrunk)
    file = io.BytesIO()
    rgb.save(file, "JPEG", quality=options.quality)
    return StoredImage(JPG, *size, file.getvalue(), REENCODED | shrunk)


def store_planes(data: bytes) -> StoredImage:
    """A CIFAR record's pixels, three planes of 32 x 32, as raw RGB."""
    planes = [Image.frombytes("L", (32, 32), data[at : at + 1024]) for at in (0, 1024, 2048)]
    return StoredImage(RAW, 32, 32, Image.merge("RGB", planes).tobytes(), PIXELS)


def decode_image(data: bytes, markers: JpegMarkers | None) -> Image.Image:
    """The image of a file, decoded; BadImage, with the reason, if it is cut or not an image.

    `markers` are those of `data`, if it is a JPEG. PIL says nothing when a JPEG's data end too early
    with an end marker, and fills the rest with gray. Without the marker it does: so it is taken away,
    with a few zeros in its place for libjpeg to read ahead. Their bits are those it would put there.
    """
    if not data:
        raise BadImage("the file is empty")
    if markers and markers.is_single_scan and markers.end is not None:
        try:
            return _load(data[: markers.end] + bytes(READ_AHEAD))
        except BadImage:
            _load(data)  # has the better reason, if it fails
            raise BadImage("cut: its compressed data end before the image does") from None
    image = _load(data)
    if markers and markers.end is None:
        raise BadImage("cut: its end marker is missing")
    if markers and markers.lacks_scans:
        raise BadImage("cut: scans of the progressive image are missing")
    return image


def shrunk_size(size: tuple[int, int], max_side: int) -> tuple[int, int]:
    """Width and height, in proportion, with the longer side at most `max_side` (0: as they are)."""
    longer = max(size)
    if not max_side or longer <= max_side:
        return size
    width, height = (max(1, (2 * side * max_side + longer) // (2 * longer)) for side in size)
    return width, height


def stored_mode(size: tuple[int, int], options: ImageOptions) -> int:
    """JPG or RAW for an image of that width and height."""
    if options.mode == "smart":
        return RAW if 3 * size[0] * size[1] <= options.smart_threshold else JPG
    return RAW if options.mode == "raw" else JPG


def _load(data: bytes) -> Image.Image:
    Image.MAX_IMAGE_PIXELS = None
    Image.init()
    known = [name for name in FORMATS if name in Image.OPEN]  # not every Pillow has them all
    try:
        image = Image.open(io.BytesIO(data), formats=known)
        if image.width * image.height > MAX_PIXELS:
            raise BadImage(f"{image.width} x {image.height} pixels are more than can be decoded")
        image.load()
    except (MemoryError, BadImage):
        raise
    except Image.UnidentifiedImageError:
        raise BadImage("not an image in a known format") from None
    except Exception as error:  # whatever Pillow's plugins raise over damaged files
        reason = str(error) if isinstance(error, OSError) else f"{type(error).__name__} {error}"
        raise BadImage(reason.strip() or type(error).__name__) from None
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    try:
        return image.convert("RGB")
    except ValueError as error:
        raise BadImage(f"mode {image.mode} has no conversion to RGB: {error}") from None
