"""A generator that runs ahead in a thread of its own."""

import queue
import threading
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from typing import TypeVar

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class _Raised:
    error: BaseException


class _Ended:
    pass


def in_background(make: Callable[[], Generator[Item]], ahead: int) -> Generator[Item]:
    """The items of a generator that is made and run in a thread, `ahead` items before the consumer.

    The thread starts with the first item asked for. What it raises is raised here, after the items that
    it made before. When the iterator is exhausted, closed or dropped, the generator is closed and the
    thread has ended.
    """
    made: queue.SimpleQueue[Item | _Raised | type[_Ended]] = queue.SimpleQueue()
    places, stopped = threading.Semaphore(ahead), threading.Event()
    thread = threading.Thread(
        target=_run, args=(make, made, places, stopped), name="pcl_fast loader", daemon=True
    )
    thread.start()
    try:
        while (item := made.get()) is not _Ended:
            places.release()
            if isinstance(item, _Raised):
                raise item.error
            yield item  # pyright: ignore[reportReturnType]
            del item  # or it would be kept while the next one is awaited
    finally:
        stopped.set()
        places.release()
        thread.join()


def _run(
    make: Callable[[], Generator[Item]],
    made: "queue.SimpleQueue[Item | _Raised | type[_Ended]]",
    places: threading.Semaphore,
    stopped: threading.Event,
) -> None:
    try:
        with closing(make()) as items:
            while places.acquire() and not stopped.is_set():
                item = next(items, _Ended)
                made.put(item)  # pyright: ignore[reportArgumentType]
                if item is _Ended:
                    return
                del item
    except BaseException as error:
        made.put(_Raised(error))
