"""What an unfinished conversion keeps, in a folder beside the file it will become, so that it can go on.

The folder holds the data written so far, a journal with a record for each image that is dealt with, and
the plan they belong to. The journal is written after the data it speaks of have reached the disk.
"""

import fcntl
import json
import os
import shutil
import struct
import time
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from datasets_prep.listings.listing import Listing
from pcl_fast import atomic
from pcl_fast.errors import ConfigError

SUFFIX = ".converting"
# A record of the journal. `identity` is Listing.identity; `digest` is of the source's bytes.
RECORD = np.dtype(
    [
        ("identity", "V8"),
        ("digest", "V16"),
        ("status", "u1"),
        ("how", "u1"),
        ("mode", "u1"),
        ("width", "<u2"),
        ("height", "<u2"),
        ("offset", "<u8"),
        ("length", "<u8"),
        ("crc32", "<u4"),
    ]
)
STORED, BAD, UNREAD = 1, 2, 3  # UNREAD: the file could not be read this time; another run tries again
BLOCK = struct.Struct("<4sQII")  # magic, first image, records, bytes of reasons; then both, and a CRC-32
MAGIC = b"PCLj"
LOCK_SECONDS = 10.0


class ConversionState:
    """The work folder of a conversion to `destination`, held by this process alone.

    `records_N` (RECORD) and `reasons` (why an image is BAD or UNREAD) are known for the first `done`
    images. ConfigError if another conversion to the same destination is running.
    """

    def __init__(self, destination: Path, listing: Listing) -> None:
        self.destination, self.listing = destination, listing
        self.folder = destination.with_name(destination.name + SUFFIX)
        self.data, self.heartbeats = self.folder / "data", self.folder / "heartbeats"
        self.records_N = np.zeros(len(listing), RECORD)
        self.reasons: dict[int, str] = {}
        self.done = self.journal_size = 0
        self.lock = _lock(self.folder)

    def resume(self, plan: Mapping[str, Any], report: Callable[[str], None]) -> None:
        """Take over what an earlier process did by the same plan, as far as the source is unchanged."""
        plan_path, journal = self.folder / "plan.json", self.folder / "journal"
        wanted = json.dumps(plan, sort_keys=True)
        try:
            same = plan_path.read_text() == wanted
        except OSError:
            same = False
        if same:
            self._read_journal(journal)
            self._forget_what_changed()
        elif journal.exists():
            report(f"{self.folder} is of a conversion with other options: starting anew")
        end = self.end_of_data()
        with self.data.open("ab") as file:
            if file.tell() < end:  # someone cut it
                self.done = end = 0
            file.truncate(end)  # gaps between pages must be holes again
        journal.unlink(missing_ok=True)
        atomic.write_text(plan_path, wanted)
        if self.done:
            self._append(0)
            report(f"going on after the first {self.done:,} of {len(self.listing):,} images")

    def end_of_data(self) -> int:
        """Where the data of the images that are done end."""
        stored = np.flatnonzero(self.records_N["status"][: self.done] == STORED)
        if not len(stored):
            return 0
        last = self.records_N[stored[-1]]
        return int(last["offset"]) + int(last["length"])

    def record(self, records: NDArray[np.void], reasons: Mapping[int, str]) -> None:
        """Note what became of the next images; `save` makes it last."""
        self.records_N[self.done : self.done + len(records)] = records
        self.reasons.update(reasons)
        self.done += len(records)

    def save(self, saved: int) -> int:
        """Make the records from image `saved` on last; returns how many images are safe now."""
        if self.done > saved:
            with self.data.open("rb") as file:
                os.fsync(file.fileno())
            self._append(saved)
        return self.done

    def remove(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.folder)

    def close(self) -> None:
        """Let others use the folder."""
        os.close(self.lock)

    def _append(self, first: int) -> None:
        records = self.records_N[first : self.done].tobytes()
        news = {index: why for index, why in self.reasons.items() if first <= index < self.done}
        reasons = json.dumps(news).encode()
        block = BLOCK.pack(MAGIC, first, self.done - first, len(reasons)) + records + reasons
        with (self.folder / "journal").open("ab") as file:
            file.truncate(self.journal_size)  # of what an earlier attempt could not write to its end
            file.write(block + zlib.crc32(block).to_bytes(4, "little"))
            file.flush()
            os.fsync(file.fileno())
            self.journal_size = file.tell()

    def _read_journal(self, path: Path) -> None:
        """Read whole blocks; the last may be torn."""
        content = path.read_bytes() if path.exists() else b""
        position = 0
        while position + BLOCK.size <= len(content):
            magic, first, count, reasons_length = BLOCK.unpack_from(content, position)
            records_at = position + BLOCK.size
            reasons_at = records_at + count * RECORD.itemsize
            end = reasons_at + reasons_length
            checksum = int.from_bytes(content[end : end + 4], "little")
            fits = magic == MAGIC and first == self.done and first + count <= len(self.listing)
            if not fits or end + 4 > len(content) or zlib.crc32(content[position:end]) != checksum:
                return
            news = cast("dict[str, str]", json.loads(content[reasons_at:end]))
            records = np.frombuffer(content, RECORD, count, records_at)
            self.record(records, {int(index): why for index, why in news.items()})
            position = end + 4

    def _forget_what_changed(self) -> None:
        """Keep the images before the first that was not read, or is another one now."""
        for index in range(self.done):
            record = self.records_N[index]
            same = record["identity"].tobytes() == self.listing.identity(index)
            if record["status"] == UNREAD or not same:
                self.done = index
                break
        self.records_N[self.done :] = np.zeros((), RECORD)
        self.reasons = {index: why for index, why in self.reasons.items() if index < self.done}


def _lock(folder: Path) -> int:
    """Make the folder, and hold its lock; it is shared with worker processes, so that none is left over."""
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"{folder} is in use: another conversion to the same file is running; wait for its end"
                ) from None
            time.sleep(0.1)
            continue
        try:
            if os.path.samestat(os.fstat(descriptor), os.stat(folder / "lock")):
                return descriptor
        except FileNotFoundError:
            pass  # its owner finished meanwhile, and removed it
        os.close(descriptor)
