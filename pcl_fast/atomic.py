"""Files that are complete or absent: written beside their place, flushed to the disk, then renamed."""

import contextlib
import os
import secrets
from collections.abc import Generator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path) -> Generator[Path, None, None]:
    """Yield a temporary path in the folder of `path`; on success it becomes `path`.

    The data and the folder entry are on the disk when the block ends. If the block raises, or the
    process dies, `path` is what it was before; an exception also removes the temporary file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files that killed processes left in `folder`; none may be writing there now."""
    for leftover in folder.glob(".*.part"):
        leftover.unlink()


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path`, wholly or not at all."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` as UTF-8, wholly or not at all."""
    write_bytes(path, text.encode())


def sync(path: Path) -> None:
    """Have what is written to a file, or the entries of a folder, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
