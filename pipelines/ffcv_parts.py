"""FFCV's loader with an operation that decodes an image once, and a thread whose errors are heard."""

import atexit
import contextlib
import ctypes
import functools
import queue
import warnings
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numba
import numpy as np
import torch
from numpy.typing import NDArray

from pipelines import ffcv_kernel as kernel


@contextlib.contextmanager
def settings_kept() -> Generator[None]:
    """A block after which torch and numba have as many threads, and processes the start, as before.

    FFCV sets all of them. It also uses what Python deprecates; nobody here can help that.
    """
    method = torch.multiprocessing.get_start_method(allow_none=True)  # first: numba fixes it when asked
    threads = torch.get_num_threads(), numba.get_num_threads()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        torch.set_num_threads(threads[0])
        numba.set_num_threads(threads[1])
        torch.multiprocessing.set_start_method(method, force=True)


with settings_kept():
    import ffcv._libffcv
    from ffcv.loader import Loader
    from ffcv.loader.epoch_iterator import EpochIterator
    from ffcv.pipeline.allocation_query import AllocationQuery
    from ffcv.pipeline.operation import Operation
    from ffcv.pipeline.pipeline_spec import PipelineSpec
    from ffcv.pipeline.state import State

# Images that a thread takes at a time: sizes vary, and nobody should wait long for the last.
IMAGES_AT_A_TIME = 1
PUT_SECONDS = 0.1


class Work(Protocol):
    """What is done with each batch, in the thread of an `Epoch`."""

    def begin(self, ids_B: NDArray[np.int64], table: NDArray[np.int64]) -> Any:
        """Fill in the columns OUT, STRIDE, JOB and CHECKSUM, and return what `end` is to have."""
        ...

    def end(self, ids_B: NDArray[np.int64], table: NDArray[np.int64], begun: Any) -> Any:
        """What the consumer gets; raises what is wrong."""
        ...


@dataclass(frozen=True, slots=True)
class Failure:
    """What the thread ended with."""

    error: BaseException


class DecodeOnce(Operation):
    """An FFCV decoder: looks up each image's bytes and has a table of them worked off in parallel."""

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, AllocationQuery]:
        """A row of the table for each image."""
        columns, kind = (kernel.COLUMNS,), np.dtype("<i8")
        return replace(previous_state, shape=columns, dtype=kind), AllocationQuery(columns, kind)

    def generate_code(self) -> Callable[..., Any]:
        """The function that FFCV compiles."""
        read: Any = self.memory_read
        decode_all = kernel.decode_all
        address, length, height, width, mode = (
            kernel.ADDRESS, kernel.LENGTH, kernel.HEIGHT, kernel.WIDTH, kernel.MODE
        )  # fmt: skip

        def decode(ids, table, metadata, state):  # pyright: ignore[reportMissingParameterType]
            memory, natives, handles, infos, scratches = state
            for row in range(len(ids)):
                image = metadata[ids[row]]
                data = read(image["data_ptr"], memory)
                table[row, address], table[row, length] = data.ctypes.data, data.size
                table[row, height], table[row, width] = image["height"], image["width"]
                table[row, mode] = image["mode"]
            decode_all(table, natives, handles, infos, scratches)
            return table

        return decode


class Epoch(EpochIterator):
    """The thread that works off batches of an epoch, and the iterator over what it made of them.

    Unlike FFCV's it ends when it is closed, wherever it is; and what is raised in it is raised by `next`.
    """

    def __init__(
        self,
        loader: Loader,
        order: NDArray[np.int64],
        work: Work,
        natives: NDArray[np.int64],
        before: Callable[[int], None],
    ):
        """Start the thread, which calls `before` with the number of each batch."""
        threads = loader.num_workers
        images = loader.reader.metadata["f0"]
        pixels = int((images["height"].astype(np.int64) * images["width"]).max())
        self.work, self.natives, self.before = work, natives, before
        self.handles, self.infos = np.zeros(threads, np.int64), np.zeros((threads, kernel.INFO), np.int32)
        self.scratches = np.empty((threads, 3 * pixels), np.uint8)
        # A thread that decodes while Python goes away around it would abort the process.
        atexit.register(self.end)
        super().__init__(loader, order)  # pyright: ignore[reportArgumentType]

    def run(self) -> None:
        """Work off every batch; called in the thread."""
        try:
            numba.set_num_threads(self.loader.num_workers)
            numba.set_parallel_chunksize(IMAGES_AT_A_TIME)
            own = (self.natives, self.handles, self.infos, self.scratches)
            self.storage_state = (self.storage_state, *own)
            batches: Any = self.iter_ixes
            for number, ids_B in enumerate(batches):
                if not self._put(self._make(number, ids_B)):
                    return
            self._put(None)
        except BaseException as error:
            self._put(Failure(error))
        finally:
            kernel.free_handles(self.natives, self.handles)
            atexit.unregister(self.end)

    def end(self) -> None:
        """Have the thread end, and wait until it has."""
        self.close()
        self.join()

    def _make(self, number: int, ids_B: NDArray[np.int64]) -> Any:
        (memory,) = self.memory_allocations["operation"].values()
        table = memory[0, : len(ids_B)]
        self.before(number)
        begun = self.work.begin(ids_B, table)
        self.run_pipeline(number, ids_B, 0, None)
        return self.work.end(ids_B, table, begun)

    def _put(self, made: Any) -> bool:
        """Hand over; False if nobody wants it any more."""
        while not self.terminate_event.is_set():
            with contextlib.suppress(queue.Full):
                self.output_queue.put(made, timeout=PUT_SECONDS)
                return True
        return False

    def __next__(self) -> Any:
        """The next batch; raises what the thread ended with."""
        made = self.output_queue.get()
        if isinstance(made, Failure):
            if isinstance(made.error, StopIteration):  # would look like the end of the epoch
                raise RuntimeError("a batch could not be made") from made.error
            raise made.error
        if made is None:
            raise StopIteration
        return made


def open_loader(path: str, batch_size: int, workers: int, batches_ahead: int) -> Loader:
    """FFCV's loader of a file, which only `Epoch` iterates over; sets torch's number of threads."""
    most: int = numba.config.NUMBA_NUM_THREADS  # pyright: ignore[reportAttributeAccessIssue]
    pipelines: Any = {"image": PipelineSpec("image", decoder=DecodeOnce()), "label": None}
    loader = Loader(
        path,
        batch_size,
        num_workers=min(max(workers, 1), most),
        os_cache=True,
        pipelines=pipelines,
        drop_last=False,
        batches_ahead=batches_ahead,
    )
    # An entry of a dictionary for each image, which only FFCV's own cache of pages would look at.
    for name in ("sample_to_pages", "page_to_samples", "ptr_to_size"):
        setattr(loader.memory_manager, name, {})
    return loader


def native_addresses(views: Any) -> NDArray[np.int64]:
    """The functions that the kernel calls: those that FFCV's extension is linked to, and `views`."""
    functions: list[Any] = [getattr(_library(), name) for name in kernel.FUNCTIONS]
    addresses = [ctypes.cast(function, ctypes.c_void_p).value for function in (*functions, views or 0)]
    return np.array([address or 0 for address in addresses], np.int64)


def why_damaged(data: memoryview, height: int, width: int) -> str:
    """What libturbojpeg has against a JPEG that should be of that size."""
    library, bytes_N = _library(), np.frombuffer(data, np.uint8)
    pixels = np.empty((height, width, 3), np.uint8)
    handle = library.tjInitDecompress()
    where = (bytes_N.ctypes.data, bytes_N.size, pixels.ctypes.data)
    failed = library.tjDecompress2(handle, *where, width, 0, height, 0, 0)
    reason = library.tjGetErrorStr2(handle).decode(errors="replace") if failed else "its size is another one"
    library.tjDestroy(handle)
    return reason


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(ffcv._libffcv.__file__)
    pointer, number = ctypes.c_void_p, ctypes.c_int
    library.tjInitDecompress.restype = pointer
    library.tjDecompress2.argtypes = (pointer, pointer, ctypes.c_ulong, pointer, *(number,) * 5)
    library.tjGetErrorStr2.argtypes, library.tjGetErrorStr2.restype = (pointer,), ctypes.c_char_p
    library.tjDestroy.argtypes = (pointer,)
    return library
