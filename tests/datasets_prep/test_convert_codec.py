"""What is stored of an image: PIL is the judge of pixels, and of what is an image at all."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datasets_prep.conversion.codec import (
    ORIGINAL,
    PIXELS,
    REENCODED,
    SHRUNK,
    BadImage,
    ImageOptions,
    shrunk_size,
    store_image,
    store_planes,
)
from datasets_prep.conversion.jpeg import read_markers
from pcl_fast.beton import JPG, RAW
from tests.datasets_prep.pictures import decoded, encoded, picture

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of corrupt EXIF
RAW_OPTIONS = ImageOptions(mode="raw")


def odd_kinds() -> dict[str, bytes]:
    """One file of each kind that is not simply an RGB JPEG; every one is named .JPEG somewhere."""
    image = picture(5, 61, 47)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    alpha = image.convert("RGBA")
    alpha.putalpha(picture(6, 61, 47).convert("L"))
    deep = Image.fromarray(np.asarray(picture(7, 61, 47).convert("L")).astype(np.uint16) * 257)
    return {
        "CMYK": encoded(image.convert("CMYK"), "JPEG", quality=95),
        "L": encoded(image.convert("L"), "JPEG", quality=95),
        "LA": encoded(alpha.convert("LA"), "PNG"),
        "RGBA": encoded(alpha, "PNG"),
        "P": encoded(image.quantize(64), "PNG"),
        "16 bit": encoded(deep, "PNG"),
        "PNG": encoded(image, "PNG"),
        "EXIF": encoded(image, "JPEG", quality=95, exif=exif),
    }


@pytest.mark.parametrize("kind", odd_kinds())
def test_every_kind_becomes_the_rgb_of_pil(kind: str) -> None:
    data = odd_kinds()[kind]
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(image.convert("RGB"))
    raw = store_image(data, RAW_OPTIONS)
    assert (raw.mode, raw.how) == (RAW, PIXELS)
    pixels = np.frombuffer(raw.data, np.uint8).reshape(raw.height, raw.width, 3)
    np.testing.assert_array_equal(pixels, expected)

    stored = store_image(data, ImageOptions(quality=95))
    assert (stored.mode, stored.width, stored.height) == (JPG, raw.width, raw.height)
    if kind in ("L", "EXIF"):
        assert stored.data == data, "EXIF is kept, and ignored"
        assert stored.how == ORIGINAL
    else:
        assert stored.data == encoded(Image.fromarray(expected), "JPEG", quality=95)
        assert stored.how == REENCODED


@pytest.mark.parametrize(
    "options",
    [
        {"subsampling": "4:4:4"},
        {"subsampling": "4:2:2"},
        {"subsampling": "4:2:0"},
        {"progressive": True},
        {"optimize": True},
        {"restart_marker_rows": 1},
        {"keep_rgb": True},
        {"icc_profile": bytes(70000), "comment": b"\xff\xd9 is not the end"},
    ],
)
def test_plain_jpegs_keep_their_bytes(options: dict[str, object]) -> None:
    data = encoded(picture(1, 123, 77), "JPEG", quality=92, **options)
    for trailer in (b"", b"trailing \xff\xd9 garbage" * 9):
        stored = store_image(data + trailer, ImageOptions(max_side=123))
        assert (stored.data, stored.how) == (data + trailer, ORIGINAL)
        assert (stored.width, stored.height) == (123, 77)


def test_stray_bytes_between_markers_are_not_passed_on() -> None:
    """TurboJPEG, which FFCV reads with, takes them for an error."""
    data = encoded(picture(2))
    position = 2 + 2 + int.from_bytes(data[4:6], "big")
    dirty = data[:position] + b"junk" + data[position:]
    stored = store_image(dirty, ImageOptions())
    assert stored.how == REENCODED
    assert stored.data == encoded(Image.fromarray(decoded(data)), quality=90)


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("part", [0.0, 0.01, 0.3, 0.5, 0.8, 0.99])
@pytest.mark.parametrize("ending", ["nothing", "an end marker", "zeros"])
def test_a_cut_jpeg_is_found_whatever_is_put_at_its_end(part: float, ending: str, progressive: bool) -> None:
    data = encoded(picture(3, 160, 120), quality=95, progressive=progressive)
    start = data.index(b"\xff\xda") + 14
    kept = data[: start + int(part * (len(data) - start - 40))] if part else data[:1]
    if progressive and part >= 0.5 and ending == "an end marker":
        kept = kept[: kept.rindex(b"\xff\xda")]  # what a decoder can notice: a scan is missing
    endings = {"nothing": b"", "an end marker": b"\xff\xd9", "zeros": bytes(len(data) - len(kept))}
    cut = kept + endings[ending]
    with pytest.raises(BadImage):
        store_image(cut, ImageOptions())


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty"),
        (b"<html>not found</html>", "not an image in a known format"),
        (b"\xff\xd8", "not an image in a known format"),
        (encoded(picture(4))[:-2], "image file is truncated"),
        (encoded(picture(4), "PNG")[:-60], ""),
    ],
)
def test_the_reason_is_told(data: bytes, reason: str) -> None:
    with pytest.raises(BadImage, match=reason):
        store_image(data, ImageOptions())


def test_a_premature_end_is_called_cut() -> None:
    """PIL takes such a file, and fills in gray."""
    data = bytearray(encoded(picture(4, 160, 120), quality=95))
    middle = (data.index(b"\xff\xda") + len(data)) // 2
    data[middle : middle + 2] = b"\xff\xd9"
    assert decoded(bytes(data)).shape == (120, 160, 3)
    with pytest.raises(BadImage, match="cut: its compressed data end before the image does"):
        store_image(bytes(data), ImageOptions())


def test_an_unfinished_progressive_image_is_called_cut() -> None:
    """PIL takes such a file: it is only blurred."""
    data = encoded(picture(4, 160, 120), quality=95, progressive=True)
    blurred = data[: data.rindex(b"\xff\xda")] + b"\xff\xd9"
    assert decoded(blurred).shape == (120, 160, 3)
    with pytest.raises(BadImage, match="cut: scans of the progressive image are missing"):
        store_image(blurred, ImageOptions())


def test_a_bomb_is_not_decoded() -> None:
    data = bytearray(encoded(Image.new("L", (8, 8))))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = b"\xff\xff\xff\xff"
    with pytest.raises(BadImage, match="65535 x 65535 pixels are more than can be decoded"):
        store_image(bytes(data), ImageOptions())


@pytest.mark.parametrize(
    ("size", "max_side", "expected"),
    [
        ((640, 480), 500, (500, 375)),
        ((480, 640), 500, (375, 500)),
        ((500, 333), 500, (500, 333)),
        ((501, 333), 500, (500, 332)),
        ((20000, 3), 500, (500, 1)),
        ((2000, 1000), 0, (2000, 1000)),
        ((3, 2), 2, (2, 1)),
    ],
)
def test_the_longer_side_is_shrunk(size: tuple[int, int], max_side: int, expected: tuple[int, int]) -> None:
    assert shrunk_size(size, max_side) == expected


def test_shrinking_is_pils_antialiased_resize() -> None:
    image = picture(8, 640, 480)
    data = encoded(image, quality=95)
    expected = Image.open(io.BytesIO(data)).resize((100, 75), Image.Resampling.BICUBIC)
    raw = store_image(data, ImageOptions(mode="raw", max_side=100))
    assert raw.data == expected.tobytes()
    assert raw.how == PIXELS | SHRUNK
    stored = store_image(data, ImageOptions(max_side=100, quality=77))
    assert stored.data == encoded(expected, quality=77)
    assert stored.how == REENCODED | SHRUNK


def test_smart_stores_small_images_raw_and_large_ones_as_jpegs() -> None:
    options = ImageOptions(mode="smart", smart_threshold=3 * 64 * 48)
    assert store_image(encoded(picture(0, 64, 48)), options).mode == RAW
    assert store_image(encoded(picture(0, 65, 48)), options).mode == JPG


def test_planes_are_cifars() -> None:
    planes = np.random.default_rng(0).integers(0, 256, (3, 32, 32), np.uint8)
    stored = store_planes(planes.tobytes())
    pixels = np.frombuffer(stored.data, np.uint8).reshape(stored.height, stored.width, 3)
    np.testing.assert_array_equal(pixels, planes.transpose(1, 2, 0))


def test_the_odd_photos(shared_data: Path) -> None:
    """Exactly those that PIL cannot load are refused; the others have PIL's pixels."""
    refused: dict[str, str] = {}
    for path in sorted((shared_data / "odd-images").rglob("*.jp*g")):
        data = path.read_bytes()
        if path.name == "giant-image.jpg":  # 280 million pixels take 5 seconds
            continue
        try:
            raw = store_image(data, ImageOptions(mode="raw", max_side=0))
        except BadImage as bad:
            refused[path.name] = str(bad)
            continue
        pixels = np.frombuffer(raw.data, np.uint8).reshape(raw.height, raw.width, 3)
        np.testing.assert_array_equal(pixels, decoded(data), err_msg=path.name)
    assert set(refused) == {"truncated_jpeg.jpg", "ultrahdr.jpg", "corrupt-header.jpg", "truncated.jpg"}


def test_no_real_photo_is_called_cut_and_every_one_cut_in_half_is(shared_data: Path) -> None:
    for path in sorted((shared_data / "imagenet-mini" / "val").rglob("*.JPEG")):
        data = path.read_bytes()
        assert store_image(data, ImageOptions(max_side=0)).data == data, path.name
        markers = read_markers(data)
        assert markers is not None
        assert markers.end is not None
        with pytest.raises(BadImage):
            store_image(data[: markers.end // 2] + b"\xff\xd9", ImageOptions())


@pytest.mark.parametrize("progressive", [False, True])
def test_wherever_a_jpeg_is_cut_its_markers_can_be_read(progressive: bool) -> None:
    data = encoded(picture(9), quality=80, progressive=progressive, restart_marker_rows=1)
    whole = read_markers(data)
    assert whole is not None
    assert whole.end == len(data) - 2
    assert whole.is_plain
    for size in range(2, len(data)):
        cut = read_markers(data[:size])
        assert cut is not None
        assert cut.end is None, "the end marker is the last thing in it"
        assert not cut.is_plain
