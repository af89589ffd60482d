"""Directing the workers: chunks are prepared in any order, placed in order, written, and noted in order."""

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from datasets_prep.conversion.codec import ImageOptions
from datasets_prep.conversion.messages import Prepare, Prepared, Setup
from datasets_prep.conversion.pool import CHUNKS_AHEAD, WorkerPool
from datasets_prep.conversion.state import STORED, ConversionState
from datasets_prep.conversion.writer import Layout, page_size_for
from pcl_fast.errors import ConfigError, PclError, Preempted
from pcl_fast.signals import StopSignal

CHUNK_IMAGES = {"image": 16, "planes": 512}
CHUNK_BYTES = 64 << 20  # files that are larger go alone
SAVE_SECONDS = 2.0
WAITING_CHUNKS = 4  # a worker; what is prepared before its turn has to be kept in memory


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """How the images are stored, and by how many workers."""

    image: ImageOptions
    page_size: int
    workers: int
    image_timeout: float


@dataclass(slots=True)
class Chunk:
    """Consecutive images on their way, from number `first` on, and how far they are."""

    first: int
    prepared: Prepared | None = None
    written: bool = False


class Run:
    """One attempt to bring a conversion to its end."""

    def __init__(self, state: ConversionState, options: RunOptions) -> None:
        self.state, self.options, self.listing = state, options, state.listing
        self.layout = Layout(len(state.listing), options.page_size)
        self.layout.position = max(self.layout.position, state.end_of_data())
        self.chunks: dict[int, Chunk] = {}
        self.next_image, self.next_chunk, self.next_to_place = state.done, 0, 0
        self.saved, self.saved_at = state.done, -math.inf

    def to_end(self, progress: Callable[[int, int], AbstractContextManager[Callable[[int], None]]]) -> None:
        """Convert every image that is left; whatever happens, what is done is saved."""
        total = len(self.listing)
        if self.state.done == total:
            return
        setup = Setup(
            slot=0,
            options=self.options.image,
            codec=self.listing.codec,
            data=str(self.state.data),
            heartbeats=str(self.state.heartbeats),
        )
        with ExitStack() as stack:
            stop = stack.enter_context(StopSignal())
            stack.callback(self._save_if_possible)
            show = stack.enter_context(progress(self.state.done, total))
            names, timeout = self.listing.names.__getitem__, self.options.image_timeout
            pool = WorkerPool(setup, self.options.workers, names, timeout, (self.state.lock,))
            stack.enter_context(pool)
            while self.state.done < total:
                self._step(pool)
                show(self.state.done)
                if stop.received:
                    self._save()
                    raise Preempted(
                        f"stopped by {stop.received}; {self.saved:,} of {total:,} images are done "
                        f"and kept in {self.state.folder}"
                    )

    def _step(self, pool: WorkerPool) -> None:
        """Hand out work, take in what was done, place and note what has its turn."""
        window = WAITING_CHUNKS * self.options.workers
        for slot in pool.free_slots() * CHUNKS_AHEAD:
            if (
                self.next_image < len(self.listing)
                and len(self.chunks) < window
                and slot in pool.free_slots()
            ):
                self._hand_out(pool, slot)
        for event in pool.events():
            chunk = self.chunks[event.chunk]
            if isinstance(event, Prepared):
                chunk.prepared = replace(event, records=event.records.copy())
            elif event.problem:
                raise self._cannot_write(event.problem)
            else:
                chunk.written = True
        while (chunk := self.chunks.get(self.next_to_place)) and chunk.prepared:
            pool.write(self.next_to_place, self._place(chunk.prepared))
            self.next_to_place += 1
        while self.chunks and (chunk := self.chunks[number := next(iter(self.chunks))]).written:
            assert chunk.prepared
            self.state.record(chunk.prepared.records, chunk.prepared.reasons)
            del self.chunks[number]
        if self.state.done > self.saved and time.monotonic() - self.saved_at > SAVE_SECONDS:
            self._save()

    def _hand_out(self, pool: WorkerPool, slot: int) -> None:
        first, sizes_N = self.next_image, self.listing.sizes_N
        stop = min(first + CHUNK_IMAGES[self.listing.codec], len(self.listing))
        within = np.searchsorted(np.cumsum(sizes_N[first:stop]), CHUNK_BYTES, side="right")
        stop = first + max(1, int(within))
        images = range(first, stop)
        places, identities = map(self.listing.place, images), map(self.listing.identity, images)
        pool.prepare(slot, Prepare(self.next_chunk, first, list(places), list(identities), {}))
        self.chunks[self.next_chunk] = Chunk(first)
        self.next_image, self.next_chunk = stop, self.next_chunk + 1

    def _place(self, prepared: Prepared) -> list[int]:
        """Give every stored image of a chunk its place, also in its record."""
        records = prepared.records
        stored: NDArray[np.intp] = np.flatnonzero(records["status"] == STORED)
        offsets: list[int] = []
        for number in stored:
            length = int(records["length"][number])
            if length > self.options.page_size:
                raise self._too_large(prepared, int(number))
            offsets.append(self.layout.place(length))
        records["offset"][stored] = offsets
        return offsets

    def _save(self) -> None:
        try:
            self.saved = self.state.save(self.saved)
        except OSError as error:
            raise self._cannot_write(error.strerror or str(error)) from error
        self.saved_at = time.monotonic()

    def _save_if_possible(self) -> None:
        with suppress(OSError):
            self.saved = self.state.save(self.saved)

    def _too_large(self, prepared: Prepared, number: int) -> ConfigError:
        length = int(prepared.records["length"][number])
        index = next(chunk.first for chunk in self.chunks.values() if chunk.prepared is prepared) + number
        needed = page_size_for(length)
        advice = f"give --page-size {needed >> 20}" if needed else "shrink the images with --max-side"
        return ConfigError(
            f"{self.listing.names[index]} takes {length:,} bytes, more than a page of "
            f"{self.options.page_size >> 20} MiB: {advice}"
        )

    def _cannot_write(self, problem: str) -> PclError:
        self._save_if_possible()
        return PclError(
            f"{self.state.data} cannot be written: {problem}; {self.saved:,} of {len(self.listing):,} images "
            "are done and kept there: make room and run the same command to go on, or delete the folder"
        )
