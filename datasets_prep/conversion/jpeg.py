"""What the markers of a JPEG tell without decoding it: is it whole, and does every decoder take it?"""

import re
from dataclasses import dataclass, field

import numpy as np

START = b"\xff\xd8"
END = 0xD9
MARKER = re.compile(rb"\xff+([^\x00\xff])", re.DOTALL)
# In compressed data, 0xff is followed by one of these, or by itself: it is no marker then.
IN_DATA = np.zeros(256, np.bool_)
IN_DATA[[0x00, *range(0xD0, 0xD8), 0xFF]] = True
FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
BASELINE, EXTENDED, PROGRESSIVE = 0xC0, 0xC1, 0xC2
SCAN = 0xDA
ALONE = frozenset([0x01, 0xD8, *range(0xD0, 0xD8)])  # markers without content
# 4:4:4, 4:2:2, 4:2:0, 4:4:0, 4:1:1: the luminance's sampling factors where chroma's are 1 x 1.
COMMON_SAMPLINGS = frozenset({(1, 1), (2, 1), (2, 2), (1, 2), (4, 1)})


@dataclass(slots=True)
class JpegMarkers:
    """The markers of a file. `end` is where the end marker stands, None if the file is cut before it.

    `samplings` are the factors of each component. `clean`: no stray bytes between the segments, which
    TurboJPEG (and so FFCV) takes as an error. `missing_bits` holds what the scans of a progressive
    image still owe of each coefficient: (component, coefficient) to bits.
    """

    frame: int = 0
    precision: int = 0
    samplings: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])
    scans: int = 0
    components_in_first_scan: int = 0
    clean: bool = True
    end: int | None = None
    missing_bits: dict[tuple[int, int], int] = field(default_factory=dict[tuple[int, int], int])

    @property
    def is_single_scan(self) -> bool:
        """Whether the pixels come out while the only scan is read, and not after the end marker."""
        sequential = self.frame in (BASELINE, EXTENDED)
        return sequential and 0 < self.components_in_first_scan == len(self.samplings)

    @property
    def is_plain(self) -> bool:
        """Whether TurboJPEG, libjpeg-turbo and nvJPEG all read it, as gray or colour of 8 bits."""
        chroma = self.samplings[1:]
        sampled = not chroma or (self.samplings[0] in COMMON_SAMPLINGS and set(chroma) == {(1, 1)})
        return (
            self.clean
            and self.end is not None
            and self.frame in (BASELINE, EXTENDED, PROGRESSIVE)
            and self.precision == 8
            and len(self.samplings) in (1, 3)
            and sampled
        )

    @property
    def lacks_scans(self) -> bool:
        """Whether scans of a progressive image are missing: it would decode, blurred."""
        return self.frame == PROGRESSIVE and (
            any(self.missing_bits.values())
            or any((component, 0) not in self.missing_bits for component in range(len(self.samplings)))
        )


def read_markers(data: bytes) -> JpegMarkers | None:
    """The markers of a JPEG; None if `data` does not begin as one."""
    if not data.startswith(START):
        return None
    found, position = JpegMarkers(), len(START)
    component_ids: list[int] = []
    while match := MARKER.search(data, position):
        marker, content = match[1][0], match.end()
        found.clean &= match.start() == position
        if marker == END:
            found.end = match.start()
            return found
        if marker in ALONE:
            found.clean, position = False, content
            continue
        position = content + int.from_bytes(data[content : content + 2], "big")
        segment = data[content + 2 : position]
        if position > len(data) or position < content + 2:
            return found
        if marker in FRAMES and len(segment) >= 6:
            component_ids = _read_frame(found, marker, segment)
        elif marker == SCAN and len(segment) >= 4:
            _read_scan(found, component_ids, segment)
            position = _after_data(data, position)
    return found


def _after_data(data: bytes, position: int) -> int:
    """The place of the first marker after the compressed data at `position`, or the end."""
    rest = np.frombuffer(data, np.uint8, offset=position)
    (marks,) = np.nonzero(rest[:-1] == 0xFF)
    (markers,) = np.nonzero(~IN_DATA[rest[marks + 1]])
    return position + int(marks[markers[0]]) if len(markers) else len(data)


def _read_frame(found: JpegMarkers, marker: int, segment: bytes) -> list[int]:
    found.frame, found.precision = marker, segment[0]
    parts = [segment[at : at + 3] for at in range(6, len(segment) - 2, 3)][: segment[5]]
    found.samplings = [(part[1] >> 4, part[1] & 15) for part in parts]
    return [part[0] for part in parts]


def _read_scan(found: JpegMarkers, component_ids: list[int], segment: bytes) -> None:
    found.scans += 1
    count = segment[0]
    if found.scans == 1:
        found.components_in_first_scan = count
    if found.frame != PROGRESSIVE or len(segment) < 2 * count + 4:
        return
    first, last, bits = segment[2 * count + 1 : 2 * count + 4]
    for identity in segment[1 : 2 * count + 1 : 2]:
        if identity in component_ids:
            component = component_ids.index(identity)
            found.missing_bits.update(
                dict.fromkeys(((component, k) for k in range(first, last + 1)), bits & 15)
            )
