"""Telling the system which pages of a file will be read soon, so that no image waits for the disk."""

import os
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from pcl_fast.beton import BetonFile


class ReadAhead:
    """Has a file's pages read in the order in which an epoch needs them, at an even rate, a window ahead.

    For the order "pages" (`order.page_order`): while the samples of a window of pages are used, the next
    window is read. What has been read stays as long as the system has memory for it.
    """

    def __init__(self, file: BetonFile, batches: Sequence[Tensor], window_pages: int) -> None:
        """Plan the reading for these batches of sample ids."""
        page_of_batches = [file.page_of_N[ids.numpy()] for ids in batches]
        pages, first = np.unique(np.concatenate(page_of_batches), return_index=True)
        order = np.argsort(first)
        self.page_size, self.window_pages = file.page_size, window_pages
        self._pages = pages[order]
        # Before each batch: how many of the pages it and those before it need.
        self._needed = np.searchsorted(first[order], np.cumsum([len(batch) for batch in batches]))
        self._done = 0
        self._descriptor = os.open(file.path, os.O_RDONLY)

    def __call__(self, step: int) -> None:
        """Ask for what is due before batch `step`; returns at once."""
        steps = len(self._needed)
        due = max(-(-len(self._pages) * (step + 1) // steps) + self.window_pages, int(self._needed[step]))
        for page in self._pages[self._done : due].tolist():
            os.posix_fadvise(self._descriptor, page * self.page_size, self.page_size, os.POSIX_FADV_WILLNEED)
        self._done = min(max(self._done, due), len(self._pages))

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)
