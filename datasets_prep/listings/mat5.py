"""Reading an array of structures from a MATLAB file: the classes of ImageNet's development kit.

Of the published format ("MAT-File Format", MathWorks, level 5) only what such an array needs: text and
real numbers as fields; anything else becomes None.
"""

import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np

INT8, INT32, UINT32, MATRIX, COMPRESSED, UTF8 = 1, 5, 6, 14, 15, 16
NUMBERS = {
    1: "<i1",
    2: "<u1",
    3: "<i2",
    4: "<u2",
    5: "<i4",
    6: "<u4",
    7: "<f4",
    9: "<f8",
    12: "<i8",
    13: "<u8",
}
STRUCTURE, TEXT = 2, 4  # classes of arrays; numbers are 6 (double) to 15
HEADER_BYTES = 128


def read_structures(content: bytes) -> list[dict[str, Any]]:
    """The first array of structures in a file: a dictionary an element; ValueError if there is none.

    Text fields are strings, numbers floats, if there is one of them in the field.
    """
    if len(content) < HEADER_BYTES or content[126:128] != b"IM":
        raise ValueError("not a MATLAB file of level 5, little-endian")
    try:
        for kind, payload in _elements(content[HEADER_BYTES:]):
            inner = next(_elements(zlib.decompress(payload))) if kind == COMPRESSED else (kind, payload)
            value = _value(inner[1]) if inner[0] == MATRIX else None
            if isinstance(value, list):
                return value
    except (zlib.error, struct.error, StopIteration, KeyError, IndexError) as error:
        raise ValueError(f"a damaged MATLAB file ({error})") from error
    raise ValueError("there is no array of structures in it")


def _elements(content: bytes) -> Iterator[tuple[int, bytes]]:
    """Type and payload of one element after the other."""
    position = 0
    while position + 8 <= len(content):
        kind, size = struct.unpack_from("<II", content, position)
        if kind >> 16:  # a small element: four bytes of payload in the tag
            kind, size, start, end = kind & 0xFFFF, kind >> 16, position + 4, position + 8
        else:
            start = position + 8
            end = start + size + (0 if kind == COMPRESSED else -size % 8)
        if start + size > len(content):
            raise IndexError("cut")
        yield kind, content[start : start + size]
        position = end


def _value(matrix: bytes) -> Any:
    """The content of an array: structures, a string, a number, or None."""
    parts = list(_elements(matrix))
    if len(parts) < 4:
        return None
    kind = parts[0][1][0]
    if kind == STRUCTURE:
        width = struct.unpack("<i", parts[3][1])[0]
        joined = parts[4][1]
        names = [joined[at : at + width].split(b"\0")[0].decode() for at in range(0, len(joined), width)]
        values = [_value(payload) for _, payload in parts[5:]]
        return [
            dict(zip(names, values[at : at + len(names)], strict=True))
            for at in range(0, len(values), len(names))
        ]
    data_kind, data = parts[3]
    if kind == TEXT:
        if data_kind in (1, 2, UTF8):
            return data.decode("utf-8", "replace")
        return data.decode("utf-16-le" if data_kind == 4 else "utf-32-le", "replace")
    numbers = np.frombuffer(data, NUMBERS[data_kind])
    return float(numbers[0]) if len(numbers) == 1 else None
