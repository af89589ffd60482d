"""Where the files in a tar lie, so that they can be read without unpacking it; also in a tar within a tar."""

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pcl_fast.errors import DataError


@dataclass(frozen=True, slots=True)
class Member:
    """A file in a tar: its bytes are those of the tar from `offset` on. `stamp` is its time of change."""

    name: str
    offset: int
    size: int
    stamp: int


def members(path: Path, inside: Member | None = None) -> Iterator[Member]:
    """The regular files of a tar, or of the tar that lies `inside` it, in the order of the tar.

    DataError if it is cut, compressed or not a tar.
    """
    try:
        with path.open("rb") as file:
            start, size = (inside.offset, inside.size) if inside else (0, os.fstat(file.fileno()).st_size)
            file.seek(start)
            with tarfile.open(fileobj=file, mode="r:") as archive:
                for info in archive:
                    if not info.isfile():
                        continue
                    if info.offset_data + info.size > start + size:
                        raise tarfile.ReadError("unexpected end of data")
                    yield Member(info.name, info.offset_data, info.size, int(info.mtime))
    except (tarfile.TarError, OSError, EOFError) as error:
        what = f"{inside.name} in {path}" if inside else str(path)
        raise DataError(
            f"{what} is cut, compressed or not a tar file ({error}); get it again, or decompress it first"
        ) from error
