"""Memory for batches that is used again once nobody refers to it.

A batch is hundreds of megabytes. Memory fresh from the system is cleared page by page when it is first
touched: for three views of an image that takes half as long as decoding it and making them.
"""

import mmap
import threading
import weakref

import numpy as np
import torch
from torch import Tensor


class Recycler:
    """Hands out tensors in the host's memory; what `keep` of them leave behind is kept for the next."""

    def __init__(self, keep: int) -> None:
        self.keep = keep
        self._free: list[mmap.mmap] = []
        self._lock = threading.Lock()

    def empty(self, size: int) -> Tensor:
        """A uint8 tensor of `size` bytes, not cleared."""
        block = self._take(size)
        owner = np.frombuffer(block, np.uint8, size)
        # The tensor refers to `owner`, and so does whatever is made of the tensor's memory.
        weakref.finalize(owner, self._give_back, block).atexit = False
        return torch.from_numpy(owner)

    def _take(self, size: int) -> mmap.mmap:
        with self._lock:
            for number, block in enumerate(self._free):
                if size <= len(block) <= 2 * size:
                    return self._free.pop(number)
        return mmap.mmap(-1, size)

    def _give_back(self, block: mmap.mmap) -> None:
        # Without a lock: a finalizer may run at any moment, also within `_take` of the same thread.
        self._free.append(block)
        del self._free[: -self.keep]
