"""Ranks as torchrun starts them: processes with its environment, and a store that none of them holds.

They are forked from a process that has imported everything, so that one begins within a tenth of a second.
"""

import contextlib
import multiprocessing
import os
import pickle
import sys
import time
import traceback
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed import TCPStore

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.dist.preload"])

Work = Callable[..., Any]


@dataclass(frozen=True)
class Outcome:
    """How a rank has ended: with what code (below 0: the signal), what its work returned, what it printed."""

    code: int
    result: Any
    out: str
    err: str


class Ranks:
    """Ranks at work; `work(*args)` is called in each, and its result is the outcome's.

    An int that `work` returns, or SystemExit, is also the process's exit code if `exits` says so.
    """

    def __init__(self, folder: Path, size: int, work: Work, args: Sequence[Any] = ()) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.processes = [
            CONTEXT.Process(target=_begin, args=(folder, self._place(rank, size), work, tuple(args)))
            for rank in range(size)
        ]
        for process in self.processes:
            process.start()

    def _place(self, rank: int, size: int) -> dict[str, str]:
        return {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(size),
            "LOCAL_WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self._store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": "0",
        }

    def signal(self, rank: int, number: int) -> None:
        """Send a signal to a rank that lives."""
        pid = self.processes[rank].pid
        assert pid is not None
        os.kill(pid, number)

    def wait(self, seconds: float) -> list[Outcome]:
        """How all have ended; they are killed, and the test fails, if one has not after so many seconds."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        hanging = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        self.kill()
        outcomes = [self._outcome(rank) for rank in range(len(self.processes))]
        said = "\n".join(outcome.out + outcome.err for outcome in outcomes)
        assert not hanging, f"ranks {hanging} have not ended after {seconds:g} s\n{said}"
        return outcomes

    def kill(self) -> None:
        """End all of them at once, by SIGKILL."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()

    def _outcome(self, rank: int) -> Outcome:
        result, code = self._folder / f"{rank}.result", self.processes[rank].exitcode
        assert code is not None
        return Outcome(
            code,
            pickle.loads(result.read_bytes()) if result.exists() else None,
            (self._folder / f"{rank}.out").read_text(),
            (self._folder / f"{rank}.err").read_text(),
        )


@contextlib.contextmanager
def started(folder: Path, size: int, work: Work, args: Sequence[Any] = ()) -> Generator[Ranks]:
    """Ranks at work within a block, none of which outlives it."""
    ranks = Ranks(folder, size, work, args)
    try:
        yield ranks
    finally:
        ranks.kill()


def run_ranks(
    folder: Path, size: int, work: Work, args: Sequence[Any] = (), seconds: float = 60
) -> list[Any]:
    """What `work(*args)` returns on each rank; the test fails if it fails on any."""
    with started(folder, size, work, args) as ranks:
        outcomes = ranks.wait(seconds)
    for rank, outcome in enumerate(outcomes):
        assert outcome.code == 0, f"rank {rank} has ended with {outcome.code}\n{outcome.out}{outcome.err}"
    return [outcome.result for outcome in outcomes]


def command(words: Sequence[str]) -> None:
    """A command line of the product; ends the process with its exit code."""
    from pcl_fast.cli import main

    sys.argv = ["pcl-fast", *words]
    raise SystemExit(main())


def _begin(folder: Path, place: Mapping[str, str], work: Work, args: tuple[Any, ...]) -> None:
    """In the process of a rank."""
    rank = place["RANK"]
    for name, number in (("out", 1), ("err", 2)):
        descriptor = os.open(folder / f"{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, number)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    os.environ.update(place)
    torch.set_num_threads(1)
    try:
        result = work(*args)
    except SystemExit:
        raise
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    (folder / f"{rank}.result").write_bytes(pickle.dumps(result))
