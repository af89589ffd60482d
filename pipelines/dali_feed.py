"""What DALI is fed: JPEGs that it decodes just as PIL does, and PIL's pixels of all other images."""

from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pcl_fast.beton import RAW
from pipelines.images import BetonImages, ImageSource, decode

START, SCAN = b"\xff\xd8", 0xDA
FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
PLAIN_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended, progressive
SEGMENTS = frozenset(range(0xC0, 0xFF)) - set(range(0xD0, 0xDA))  # markers that have a length


@dataclass(frozen=True, slots=True)
class Fed:
    """The images of a batch, encoded: uint8 arrays, and their heights and widths, int64 `[B, 2]`."""

    encoded: list[NDArray[np.uint8]]
    sizes_B2: NDArray[np.int64]


class Feed:
    """Reads images for DALI; the parts of a batch are read by as many threads."""

    def __init__(self, source: ImageSource, pool: Executor, parts: int) -> None:
        self.source, self.pool, self.parts = source, pool, parts

    def read(self, ids_B: NDArray[np.int64]) -> Fed:
        """The images of a batch.

        Raises:
            DataError: naming the sample that cannot be read, is not what was written, or that neither
                DALI nor PIL would decode.
        """
        images = [
            one for part in self.pool.map(self._read, np.array_split(ids_B, self.parts)) for one in part
        ]
        encoded, sizes = zip(*images, strict=True)
        return Fed(list(encoded), np.array(sizes, np.int64))

    def _read(self, ids: Sequence[np.int64]) -> list[tuple[NDArray[np.uint8], tuple[int, int]]]:
        return [self._image(int(sample)) for sample in ids]

    def _image(self, sample: int) -> tuple[NDArray[np.uint8], tuple[int, int]]:
        source, data = self.source, self.source.read(sample)
        if isinstance(source, BetonImages):
            height, width = map(int, source.file.sizes_N2[sample])
            if source.file.modes_N[sample] == RAW:
                return _as_ppm(bytes(data), height, width)
            found = plain_jpeg_size(data)
            if found not in (None, (height, width)):
                raise source.damaged(sample, f"its JPEG has {found} pixels, not {(height, width)}")
        else:
            found = plain_jpeg_size(data)
        if found is not None:
            return np.frombuffer(data, np.uint8), found
        image = decode(source, sample)
        return _as_ppm(image.tobytes(), image.height, image.width)


def plain_jpeg_size(data: bytes | memoryview) -> tuple[int, int] | None:
    """Height and width of a JPEG that DALI decodes to PIL's pixels; None of any other image.

    Such a JPEG has 8 bits, is gray or has three colours, has nothing between its segments, and is not so
    large that PIL would refuse it. Where CMYK is converted to RGB, the two differ by a gray level; stray
    bytes and some damaged metadata are taken by PIL only.
    """
    size, at = None, len(START)
    if data[:at] != START:
        return None
    while at + 10 <= len(data) and data[at] == 0xFF and data[at + 1] in SEGMENTS:
        marker = data[at + 1]
        if marker == SCAN:
            return size
        if marker in FRAMES:
            size = int.from_bytes(data[at + 5 : at + 7], "big"), int.from_bytes(data[at + 7 : at + 9], "big")
            pixels = size[0] * size[1]
            odd = marker not in PLAIN_FRAMES or data[at + 4] != 8 or data[at + 9] not in (1, 3)
            if odd or not 0 < pixels <= (Image.MAX_IMAGE_PIXELS or pixels):
                return None
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None


def _as_ppm(pixels: bytes, height: int, width: int) -> tuple[NDArray[np.uint8], tuple[int, int]]:
    """Pixels as a file that DALI reads without decoding anything."""
    return np.frombuffer(b"P6 %d %d 255\n" % (width, height) + pixels, np.uint8), (height, width)
