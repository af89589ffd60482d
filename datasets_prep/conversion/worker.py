"""A process that reads, decodes and stores images: `python -m datasets_prep.conversion.worker DESCRIPTOR`.

It is told what to do over a connection. A chunk of images is prepared first, and kept; when the places
of its samples in the file are known, it is written there. So the file does not depend on the workers,
and the data do not pass through the process that directs them.
"""

import hashlib
import os
import signal
import sys
import warnings
import zlib
from multiprocessing.connection import Connection

import numpy as np
from numpy.typing import NDArray

from datasets_prep.conversion.codec import BadImage, StoredImage, store_image, store_planes
from datasets_prep.conversion.messages import Prepare, Prepared, Setup, Write, Written
from datasets_prep.conversion.state import BAD, RECORD, STORED, UNREAD
from datasets_prep.listings.listing import Place


class UnreadError(Exception):
    """A file could not be read; the message is the reason."""


class Worker:
    """Serves one connection until it is closed."""

    def __init__(self, connection: Connection, setup: Setup) -> None:
        self.connection, self.setup = connection, setup
        self.heartbeats = np.memmap(setup.heartbeats, np.int64, "r+")
        self.data = os.open(setup.data, os.O_WRONLY)
        self.kept: dict[int, list[bytes]] = {}
        self.source: tuple[str, int] | None = None

    def serve(self) -> None:
        """Do what is asked until the connection is closed."""
        while True:
            try:
                message = self.connection.recv()
                self.connection.send(
                    self.prepare(message) if isinstance(message, Prepare) else self.write(message)
                )
            except (EOFError, ConnectionError):
                return

    def prepare(self, task: Prepare) -> Prepared:
        """Decode and store a chunk in memory."""
        records, reasons = np.zeros(len(task.places), RECORD), dict[int, str]()
        kept: list[bytes] = []
        for number, place in enumerate(task.places):
            index = task.first + number
            record = records[number : number + 1]
            record["identity"] = np.void(task.identities[number])
            self.heartbeats[self.setup.slot] = index + 1
            try:
                if index in task.skipped:
                    raise UnreadError(task.skipped[index])
                stored = self._store(place, record)
            except BadImage as bad:
                record["status"], reasons[index] = BAD, str(bad)
            except UnreadError as unread:
                record["status"], reasons[index] = UNREAD, str(unread)
            else:
                kept.append(stored.data)
        self.heartbeats[self.setup.slot] = 0
        self.kept[task.chunk] = kept
        return Prepared(task.chunk, records, reasons)

    def write(self, task: Write) -> Written:
        """Put a prepared chunk into the file."""
        try:
            for offset, data in zip(task.offsets, self.kept.pop(task.chunk), strict=True):
                written = 0
                while written < len(data):
                    written += os.pwrite(self.data, memoryview(data)[written:], offset + written)
        except OSError as error:
            return Written(task.chunk, error.strerror or str(error))
        return Written(task.chunk, None)

    def _store(self, place: Place, record: NDArray[np.void]) -> StoredImage:
        data = self._read(place)
        record["digest"] = np.void(hashlib.blake2b(data, digest_size=16).digest())
        stored = store_planes(data) if self.setup.codec == "planes" else store_image(data, self.setup.options)
        facts = (stored.how, stored.mode, stored.width, stored.height, len(stored.data))
        for name, value in zip(("how", "mode", "width", "height", "length"), facts, strict=True):
            record[name] = value
        record["crc32"], record["status"] = zlib.crc32(stored.data), STORED
        return stored

    def _read(self, place: Place) -> bytes:
        try:
            if self.source is None or self.source[0] != place.file:
                if self.source:
                    os.close(self.source[1])
                    self.source = None
                self.source = (place.file, os.open(place.file, os.O_RDONLY))
            data = bytearray()
            while len(data) < place.size:
                more = os.pread(self.source[1], place.size - len(data), place.offset + len(data))
                if not more:
                    raise UnreadError("the file has become shorter since it was listed")
                data += more
        except OSError as error:
            raise UnreadError(f"cannot be read: {error.strerror}") from None
        return bytes(data)


def main() -> None:
    """Serve the connection whose descriptor is the only argument."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the directing process decides
    warnings.simplefilter("ignore")  # Pillow's, of corrupt EXIF, palettes and the like
    connection = Connection(int(sys.argv[1]))
    Worker(connection, connection.recv()).serve()


if __name__ == "__main__":
    main()
