"""Worker processes that are watched: one that dies is an error, one that hangs is replaced."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from datasets_prep.conversion.messages import Prepare, Prepared, Setup, Write, Written
from pcl_fast.errors import PclError

POLL_SECONDS = 0.25
CHUNKS_AHEAD = 2  # a worker prepares one while the next waits for it
EXIT_SECONDS = 5.0


@dataclass(slots=True)
class Handle:
    """A worker process, the chunks it has not prepared yet, and the image it has been at for how long."""

    process: subprocess.Popen[bytes]
    connection: Connection
    to_prepare: set[int]
    image: int = 0
    seconds: float = 0.0


@dataclass(slots=True)
class Task:
    """A chunk somebody is working on; `prepared` and `offsets` as far as they are known."""

    prepare: Prepare
    slot: int
    prepared: Prepared | None = None
    offsets: list[int] | None = None


class WorkerPool:
    """`count` workers; use as a context, they end with it.

    `name_of` gives the path of an image, for messages. An image that takes longer than `timeout`
    seconds is skipped, with that reason. `inherited` are descriptors that stay open in the workers.
    """

    def __init__(
        self,
        setup: Setup,
        count: int,
        name_of: Callable[[int], str],
        timeout: float,
        inherited: tuple[int, ...],
    ) -> None:
        self.setup, self.name_of, self.timeout, self.inherited = setup, name_of, timeout, inherited
        Path(setup.heartbeats).write_bytes(bytes(8 * count))
        self.heartbeats = np.memmap(setup.heartbeats, np.int64, "r+")
        self.tasks: dict[int, Task] = {}
        self.workers: list[Handle] = []
        self.checked = time.monotonic()
        try:
            for slot in range(count):
                self.workers.append(self._start(slot))
        except BaseException:
            self._end()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._end()

    def free_slots(self) -> list[int]:
        """Workers that could do with another chunk, those with the least work first."""
        loads = [(len(worker.to_prepare), slot) for slot, worker in enumerate(self.workers)]
        return [slot for load, slot in sorted(loads) if load < CHUNKS_AHEAD]

    def prepare(self, slot: int, task: Prepare) -> None:
        """Have a chunk prepared."""
        self.tasks[task.chunk] = Task(task, slot)
        self.workers[slot].to_prepare.add(task.chunk)
        self._send(slot, task)

    def write(self, chunk: int, offsets: list[int]) -> None:
        """Have a prepared chunk written to these offsets."""
        task = self.tasks[chunk]
        task.offsets = offsets
        self._send(task.slot, Write(chunk, offsets))

    def events(self) -> list[Prepared | Written]:
        """What was done meanwhile; waits a moment. PclError if a worker died or cannot write."""
        happened: list[Prepared | Written] = []
        slots = {worker.connection: slot for slot, worker in enumerate(self.workers)}
        for connection in wait(list(slots), POLL_SECONDS):
            slot = slots[connection]  # pyright: ignore[reportArgumentType]
            try:
                event = self.workers[slot].connection.recv()
            except (EOFError, ConnectionError):
                raise self._died(slot) from None
            if news := self._noted(slot, event):
                happened.append(news)
        self._watch()
        return happened

    def _noted(self, slot: int, event: Prepared | Written) -> Prepared | Written | None:
        task = self.tasks[event.chunk]
        if isinstance(event, Written):
            del self.tasks[event.chunk]
            return event
        self.workers[slot].to_prepare.discard(event.chunk)
        before, task.prepared = task.prepared, event
        if before is None:
            return event
        # Prepared again, after a worker had to be replaced before it had written the chunk.
        if before.records.tobytes() != event.records.tobytes():
            raise PclError(
                f"the source changed while it was read: {self.name_of(task.prepare.first)} or after"
            )
        if task.offsets is not None:
            self._send(slot, Write(event.chunk, task.offsets))
        return None

    def _start(self, slot: int) -> Handle:
        ours, theirs = Pipe()
        root = str(Path(__file__).resolve().parents[2])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-m", "datasets_prep.conversion.worker", str(theirs.fileno())],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(), *self.inherited),
                process_group=0,  # so that Ctrl-C reaches this process only
            )
        ours.send(replace(self.setup, slot=slot))
        return Handle(process, ours, set())

    def _send(self, slot: int, message: Prepare | Write) -> None:
        try:
            self.workers[slot].connection.send(message)
        except ConnectionError:
            raise self._died(slot) from None

    def _died(self, slot: int) -> PclError:
        try:
            code = self.workers[slot].process.wait(EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            return PclError("a conversion worker closed its connection; run the same command to go on")
        cause = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        hint = " (out of memory? try fewer --workers)" if code == -signal.SIGKILL else ""
        image = int(self.heartbeats[slot])
        where = f" while it was at {self.name_of(image - 1)}" if image else ""
        return PclError(f"a conversion worker {cause}{where}{hint}; run the same command to go on")

    def _watch(self) -> None:
        """Replace workers that have been at one image for too long."""
        now = time.monotonic()
        # When this process itself was stopped for a while, so were the workers.
        passed, self.checked = min(now - self.checked, 4 * POLL_SECONDS), now
        for slot, worker in enumerate(self.workers):
            image = int(self.heartbeats[slot])
            worker.seconds = worker.seconds + passed if image and image == worker.image else 0.0
            worker.image = image
            if worker.seconds > self.timeout:
                self._replace(slot, image - 1)

    def _replace(self, slot: int, image: int) -> None:
        old = self.workers[slot]
        _kill(old)
        self.heartbeats[slot] = 0
        self.workers[slot] = self._start(slot)
        for chunk, task in self.tasks.items():
            if task.slot != slot:
                continue
            if task.prepare.first <= image < task.prepare.first + len(task.prepare.places):
                task.prepare.skipped[image] = f"took longer than {self.timeout:g} seconds to decode"
            self.workers[slot].to_prepare.add(chunk)
            self._send(slot, task.prepare)

    def _end(self) -> None:
        for worker in self.workers:
            _kill(worker)


def _kill(worker: Handle) -> None:
    worker.process.kill()
    worker.process.wait()
    worker.connection.close()
