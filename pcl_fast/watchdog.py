"""A thread that sees when a rank makes no progress, or another has failed, and then ends the process.

Ranks tell each other through the store that they met at: where they are, that they fail and why. A rank that
waits for another, in C++ or on its GPU, can do nothing by itself.
"""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from torch.distributed import Store

from pcl_fast.signals import StopSignal

Answer = TypeVar("Answer")

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
        self._failed_since: float | None = None  # any rank, as far as known here
        self._ending = False  # the main thread ends this rank, having met a failure
        self._store_gone = False
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
            if self._failure is None:  # else the store may end any moment, with much noise of torch's
                self._ask(self._look)
            self._judge()

    def _ask(self, question: Callable[[], Answer]) -> Answer | None:
        """What the store answers; None once it is gone with the process that held it."""
        if self._store_gone:
            return None
        try:
            with self._lock:
                return question()
        except RuntimeError:
            self._store_gone = True
            self._failed_since = self._failed_since or time.monotonic()
            return None

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
        self._hear()

    def _hear(self) -> None:
        if self._store.check([FAILED]):
            self._failure = self._store.get(FAILED).decode()
            self._failed_since = self._failed_since or time.monotonic()

    def _judge(self) -> None:
        now = time.monotonic()
        if self._closing.is_set():
            return
        if self._failed_since is not None and now - self._failed_since > GRACE:
            self._end(self._loss())
        if not self._ending and now - self._since > self._timeout:
            self._end(f"no progress for {self._timeout:g} s in {self.place}{self._others()}")

    def _end(self, message: str) -> None:
        faulthandler.dump_traceback(all_threads=True)
        self.tell_failure(message)
        sys.stderr.write(f"pcl-fast: rank {self._rank}: {message}\n")
        sys.stderr.flush()
        os._exit(1)

    def tell_failure(self, error: object) -> None:
        """Tell the others that this rank fails, and why, with time to hear it; only the first is heard."""
        self._end_by_itself()
        if self._failure is not None:
            return  # another one was first
        text = f"{type(error).__name__}: {error}" if isinstance(error, BaseException) else str(error)
        own = f"rank {self._rank}: {' '.join(text.split())}"
        first = self._ask(lambda: self._store.compare_set(FAILED, "", own).decode())
        self._failure = first or own
        if self._size > 1 and first == own:
            time.sleep(3 * INTERVAL)  # the store may end with this process

    def explain_loss(self, error: BaseException) -> str:
        """Why a collective has failed with `error`, as far as anybody has told."""
        self._end_by_itself()
        deadline = time.monotonic() + 2 * INTERVAL
        while self._failure is None and time.monotonic() < deadline:
            self._ask(self._hear)
            time.sleep(INTERVAL / 5)
        told = str(error).strip().splitlines()[0].split(". This is")[0]  # gloo goes on with good wishes
        return self._loss() if self._failure else f"{self._loss()} ({told.split('] ', 1)[-1]})"

    def _end_by_itself(self) -> None:
        """Take the time that this needs for no hang."""
        self._ending = True
        self._failed_since = self._failed_since or time.monotonic()

    def _loss(self) -> str:
        return f"lost another rank in {self.place}: {self._failure or 'it has gone without a word'}"

    def _others(self) -> str:
        """Where the other ranks were last heard of."""
        others = [rank for rank in range(self._size) if rank != self._rank]
        found = [f"rank {rank}: {self._ask(partial(self._place_of, rank)) or 'gone'}" for rank in others]
        return f"; elsewhere {', '.join(found)}" if found else ""

    def _place_of(self, rank: int) -> str:
        key = f"pcl_fast/place/{rank}"
        return self._store.get(key).decode() if self._store.check([key]) else "nowhere"

    def close(self) -> None:
        """Stop watching."""
        self._closing.set()
        self.join()
