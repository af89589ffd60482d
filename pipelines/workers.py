"""Torch's DataLoader, with an end: what goes wrong in a worker is told at the next batch, and all end.

Left alone it draws from everybody's random numbers, raises the death of a worker from a signal handler,
wherever the trainer happens to be (even where exceptions are dropped), and loses its workers to Ctrl-C.
"""

import contextlib
import signal
import warnings
from collections.abc import Generator, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data._utils import signal_handling

from pcl_fast.errors import PclError

Made = TypeVar("Made")
POLL_SECONDS = 1.0
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def made_by_workers(
    dataset: Dataset[Made], batches: Sequence[Tensor], workers: int, pin_memory: bool
) -> Iterator[Made]:
    """What `dataset.__getitems__` makes of the ids of each batch, in order; 0 workers: in this process.

    Raises:
        PclError: if a worker dies, naming its exit code.
    """
    iterator = _started(dataset, batches, workers, pin_memory)
    try:
        while True:
            try:
                made = next(iterator)
            except StopIteration:
                return
            except (EOFError, OSError, RuntimeError) as error:
                if _only_waited_long(error):
                    continue
                _raise_if_dead(iterator, error)
                raise
            yield made
    finally:
        # It would do so when it is collected, but the traceback of an exception keeps it alive.
        getattr(iterator, "_shutdown_workers", lambda: None)()


def _started(
    dataset: Dataset[Made], batches: Sequence[Tensor], workers: int, pin_memory: bool
) -> Iterator[Made]:
    with warnings.catch_warnings():  # of more workers than cores, which may be what is wanted
        warnings.simplefilter("ignore")
        loader = DataLoader(
            dataset,
            batch_sampler=(ids.tolist() for ids in batches),  # pyright: ignore[reportArgumentType]
            num_workers=workers,
            collate_fn=_as_made,
            pin_memory=pin_memory,
            worker_init_fn=_leave_signals_to_the_trainer,
            generator=torch.Generator(),  # or else each epoch would draw from the trainer's
            timeout=POLL_SECONDS if workers else 0,
        )
        with _signals_held():  # also in the workers, until they have their handlers
            iterator: Any = iter(loader)
    if getattr(iterator, "_worker_pids_set", False):
        # Torch's handler of SIGCHLD raises for the processes on this list; the timeout finds them, too.
        signal_handling._remove_worker_pids(id(iterator))  # pyright: ignore[reportPrivateUsage]
        iterator._worker_pids_set = False
    return iterator


def _only_waited_long(error: Exception) -> bool:
    """Whether no batch was ready yet; torch has then seen all workers alive, and one may ask again."""
    return isinstance(error, RuntimeError) and str(error).startswith("DataLoader timed out")


def _raise_if_dead(iterator: Iterator[object], error: Exception) -> None:
    """Raise PclError if the error is one that a dead worker leaves: torch's own, or of its connection."""
    torchs = isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker")
    if not torchs and not isinstance(error, EOFError | ConnectionError | FileNotFoundError):
        return
    codes = [worker.exitcode for worker in getattr(iterator, "_workers", ()) if worker.exitcode]
    how = f"exit code {codes[0]}" if codes else f"its connection broke: {type(error).__name__}"
    raise PclError(
        f"a worker of the loader died ({how}); if memory ran out, fewer --data.workers need less of it"
    ) from error


def _as_made(made: Any) -> Any:
    return made


@contextlib.contextmanager
def _signals_held() -> Generator[None]:
    """A block in which the trainer's signals wait; processes that it starts begin in that state."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _leave_signals_to_the_trainer(_: int) -> None:
    """Ctrl-C and the signals of schedulers reach workers, too; the trainer saves first and then ends them."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
