"""A thread that sees when a rank makes no progress, or another has failed, and then ends the process.

Ranks tell each other through the store that they met at: where they are, that they fail and why. A rank that
waits for another, in C++ or on its GPU, can do nothing by itself.
"""

import contextlib
import faulthandler
import os
import sys
import threading
import time
from typing import Any

from torch.distributed import Store

from pcl_fast.signals import StopSignal

INTERVAL = 0.5  # seconds between two looks
GRACE = 10.0  # seconds in which a rank whose peer has failed may end by itself
FAILED, STOPPED = "pcl_fast/failed", "pcl_fast/stopped"


class Watchdog(threading.Thread):
    """Watches this process from a thread of its own.

    `place` says where the process is. What `stop` receives on one rank is passed on to that of all.
    """

    def __init__(self, store: Store, rank: int, size: int, timeout: float) -> None:
        super().__init__(name="watchdog", daemon=True)
        self._store, self._rank, self._size, self._timeout = store, rank, size, timeout
        self._at: tuple[str, int] = ("the beginning", 0)
        self._since = time.monotonic()
        self._posted: str | None = None
        self._closing = threading.Event()
        self._failed_since: float | None = None
        self._failure: str | None = None  # the first of all ranks: which, and why
        self._lock = threading.Lock()  # of the store
        self._stop_known = False
        self.stop: StopSignal | None = None

    def enter(self, phase: str, step: int) -> None:
        """The process is alive, and does this now."""
        self._at = phase, step
        self._since = time.monotonic()

    @property
    def place(self) -> str:
        """Where the process is, in words."""
        phase, step = self._at
        return f"step {step} ({phase})" if step else phase

    def run(self) -> None:
        """Look around until closed."""
        while not self._closing.wait(INTERVAL):
            if self._failed_since is None:  # then the store may end any moment, with much noise
                try:
                    with self._lock:
                        self._look()
                except RuntimeError:  # the store is gone with the process that held it
                    self._failed_since = time.monotonic()
            self._judge()

    def _look(self) -> None:
        if self._posted != self.place:
            self._posted = self.place
            self._store.set(f"pcl_fast/place/{self._rank}", self.place)
        if self.stop is not None and not self._stop_known:
            if self.stop.received is not None:
                self._store.set(STOPPED, self.stop.received)
            elif self._store.check([STOPPED]):
                self.stop.received = self._store.get(STOPPED).decode()
            self._stop_known = self.stop.received is not None
        if self._store.check([FAILED]):
            self._failure = self._store.get(FAILED).decode()
            self._failed_since = time.monotonic()

    def _judge(self) -> None:
        now = time.monotonic()
        if self._closing.is_set():
            return
        if self._failed_since is not None and now - self._failed_since > GRACE:
            self._end(self._loss())
        if now - self._since > self._timeout:
            faulthandler.dump_traceback(all_threads=True)
            self._end(f"no progress for {self._timeout:g} s in {self.place}{self._others()}")

    def _end(self, message: str) -> None:
        self.tell_failure(message)
        sys.stderr.write(f"pcl-fast: rank {self._rank}: {message}\n")
        sys.stderr.flush()
        os._exit(1)

    def tell_failure(self, error: object) -> None:
        """Tell the others that this rank fails, and why, with time to hear it; only the first is heard."""
        if self._failed_since is not None:
            return  # another one was first
        text = f"{type(error).__name__}: {error}" if isinstance(error, BaseException) else str(error)
        own = f"rank {self._rank}: {' '.join(text.split())}"
        try:
            with self._lock:
                self._failure = self._store.compare_set(FAILED, "", own).decode()
        except RuntimeError:
            return  # nobody is left who could hear it
        if self._size > 1 and self._failure == own:
            time.sleep(3 * INTERVAL)  # the store may end with this process

    def explain_loss(self, error: BaseException) -> str:
        """Why a collective has failed with `error`, as far as anybody has told."""
        deadline = time.monotonic() + 2 * INTERVAL
        while self._reason() is None and time.monotonic() < deadline:
            time.sleep(INTERVAL / 5)
        first = str(error).strip().split("\n")[0]
        return self._loss() if self._reason() else f"{self._loss()} ({first})"

    def _loss(self) -> str:
        return f"lost another rank in {self.place}: {self._reason() or 'it has gone without a word'}"

    def _reason(self) -> str | None:
        if self._failure is None and self._failed_since is None:
            with self._lock, contextlib.suppress(RuntimeError):
                if self._store.check([FAILED]):
                    self._failure = self._store.get(FAILED).decode()
        return self._failure

    def _others(self) -> str:
        """Where the other ranks were last heard of."""
        found: list[str] = []
        for rank in range(self._size):
            key = f"pcl_fast/place/{rank}"
            if rank != self._rank:
                try:
                    with self._lock:
                        where: Any = self._store.get(key).decode() if self._store.check([key]) else "nowhere"
                except RuntimeError:
                    where = "gone"
                found.append(f"rank {rank}: {where}")
        return f"; elsewhere {', '.join(found)}" if found else ""

    def close(self) -> None:
        """Stop watching."""
        self._closing.set()
        self.join()
