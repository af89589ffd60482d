"""Reading ahead: every page once, before it is needed, and not much sooner than a window before."""

import os
from pathlib import Path

import numpy as np
import pytest

from pcl_fast.beton import open_beton
from pipelines.order import page_order
from pipelines.read_ahead import ReadAhead
from tests.datasets_prep.pictures import ImageOptions, convert_folder, write_folder

PAGE = 1 << 21
WINDOW, BATCH = 2, 4


@pytest.mark.parametrize("first_step", [0, 5])
def test_pages_are_asked_for_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first_step: int
) -> None:
    path = tmp_path / "file.beton"
    raw = ImageOptions(mode="raw", max_side=0)
    source = write_folder(tmp_path / "source", images=48, width=700, height=300)
    convert_folder(source, path, image=raw, page_size=PAGE)
    asked: list[int] = []

    def note(descriptor: int, offset: int, length: int, advice: int) -> None:
        assert (offset % PAGE, length, advice) == (0, PAGE, os.POSIX_FADV_WILLNEED)
        assert os.fstat(descriptor).st_ino == path.stat().st_ino
        asked.append(offset // PAGE)

    monkeypatch.setattr(os, "posix_fadvise", note)
    with open_beton(path) as file:
        pages = len(np.unique(file.page_of_N))
        assert pages >= 5 * WINDOW
        batches = page_order(file.page_of_N, WINDOW, seed=3, epoch=1).split(BATCH)[first_step:]
        ahead = ReadAhead(file, batches, WINDOW)
        used: set[int] = set()
        for step, ids in enumerate(batches):
            ahead(step)
            used |= set(file.page_of_N[ids.numpy()].tolist())
            assert used <= set(asked)
            assert len(asked) <= len(used) + 2 * WINDOW
        ahead.close()
    assert sorted(asked) == sorted(used)
