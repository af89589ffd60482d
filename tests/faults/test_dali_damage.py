"""Damaged images, failing threads and abandoned iterators: DALI's loader says so, and goes on afterwards."""

import dataclasses
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pcl_fast.beton import SAMPLES_AT, open_beton
from pcl_fast.errors import ConfigError, DataError
from pcl_fast.manifest import manifest_path
from pipelines.dali_feed import Feed
from pipelines.dali_loader import DaliEvalLoader, DaliTrainLoader
from pipelines.normalisation import NORMALISATIONS
from pipelines.options import ImageEvalOptions, ImageTrainOptions
from tests.conftest import REPOSITORY
from tests.datasets_prep.pictures import convert_folder, encoded, picture, write_folder
from tests.pipelines.batches import ENDS, end_iterator

pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed: pip install 'pcl-fast[dali]'")

IMAGES = 30
COMMON: dict[str, Any] = {
    "num_classes": 3,
    "normalisation": NORMALISATIONS["imagenet"],
    "device": torch.device("cpu"),
    "channels_last": True,
    "image_size": 16,
    "workers": 2,
}
TRAIN = ImageTrainOptions(batch_size=3, num_views=2, seed=7, **COMMON)
EVAL = ImageEvalOptions(batch_size=3, resize=16, **COMMON)
JPEG = encoded(picture(5, width=200, height=150), quality=95)
SECONDS = 5


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "photos", images=IMAGES)


@pytest.fixture
def beton(folder: Path) -> Path:
    path = folder.parent / "photos.beton"
    convert_folder(folder, path)
    return path


def tasks() -> int:
    """Threads of this process, those of libraries included."""
    return len(os.listdir("/proc/self/task"))


def all_ended(before: int) -> bool:
    """Whether there are so many threads again; the system takes a moment to bury one that was joined."""
    deadline = time.monotonic() + 2
    while tasks() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    return tasks() <= before


def epoch_fails(loader: DaliTrainLoader | DaliEvalLoader, match: str) -> int:
    """Expect an epoch to end with this DataError, in time and with every thread; the batches before it."""
    before = tasks()
    batches: Iterator[Any] = loader.epoch(0) if isinstance(loader, DaliTrainLoader) else iter(loader)
    served = [time.monotonic()]
    with pytest.raises(DataError, match=match) as caught:
        served.extend(time.monotonic() for _ in batches)
    assert time.monotonic() - served[-1] < SECONDS
    assert "\n" not in str(caught.value)
    assert all_ended(before)
    return len(served) - 1


@pytest.mark.parametrize(
    "damaged",
    [
        JPEG[:-2],
        JPEG[: len(JPEG) // 2],
        JPEG[:100],
        b"",
        b"not an image",
        JPEG[:20] + bytes(len(JPEG) - 20),
        encoded(picture(5), "PNG")[:200],
    ],
    ids=["end cut", "half", "header only", "empty", "text", "zeros", "half a PNG"],
)
@pytest.mark.parametrize("crops", ["ours", "library"])
def test_a_damaged_file_is_named_and_the_loader_goes_on(folder: Path, damaged: bytes, crops: str) -> None:
    path = folder / "c1" / "0013.jpg"
    whole = path.read_bytes()
    path.write_bytes(damaged)
    train = DaliTrainLoader(folder, dataclasses.replace(TRAIN, crops=crops))
    epoch_fails(train, r"0013\.jpg is damaged \(")
    path.write_bytes(whole)
    assert len(list(train.epoch(0))) == IMAGES // 3


def test_batches_before_a_damaged_one_are_served(folder: Path) -> None:
    (folder / "c2" / "0029.jpg").write_bytes(JPEG[:-2])
    served = epoch_fails(DaliEvalLoader(folder, EVAL), r"0029\.jpg is damaged")
    assert served == IMAGES // 3 - 1


def test_a_file_that_vanishes_is_named(folder: Path) -> None:
    loader = DaliTrainLoader(folder, TRAIN)
    (folder / "c1" / "0013.jpg").unlink()
    epoch_fails(loader, r"0013\.jpg cannot be read: No such file")


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


def test_a_flipped_bit_in_a_beton_is_told_by_its_checksum(beton: Path) -> None:
    place = int(open_beton(beton).offsets_N[17])
    flip(beton, place + 700)
    epoch_fails(
        DaliTrainLoader(beton, TRAIN), "sample 17 is damaged .its checksum is wrong.; `pcl-fast verify"
    )
    epoch_fails(DaliEvalLoader(beton, EVAL), "sample 17 is damaged .its checksum is wrong")


def test_damage_in_a_beton_without_checksums_is_told_where_pil_tells_it(beton: Path) -> None:
    manifest_path(beton).unlink()
    file = open_beton(beton)
    place, length = int(file.offsets_N[17]), int(file.lengths_N[17])
    data = bytearray(beton.read_bytes())
    data[place + length // 2 : place + length] = bytes(length - length // 2)
    beton.write_bytes(data)
    epoch_fails(DaliTrainLoader(beton, TRAIN), "sample 17 is damaged .PIL cannot decode it")


def test_a_size_that_is_not_the_jpegs_is_refused(beton: Path) -> None:
    """Boxes are drawn for it: views would show what lies beyond the image."""
    manifest_path(beton).unlink()
    flip(beton, SAMPLES_AT + 24 * 17 + 1)  # the lower byte of its width
    epoch_fails(
        DaliTrainLoader(beton, TRAIN), r"sample 17 is damaged .its JPEG has \(48, 64\) pixels, not \(48, 80\)"
    )


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_what_fails_in_a_thread_is_raised_in_the_consumer(
    folder: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the fifth batch that is read."""
    batches, read = iter(range(5)), Feed.read

    def failing(self: Feed, ids_B: Any) -> Any:
        if next(batches, None) is None:
            raise ZeroDivisionError("the fifth")
        return read(self, ids_B)

    monkeypatch.setattr(Feed, "read", failing)
    before, began = tasks(), time.monotonic()
    with pytest.raises(ZeroDivisionError, match="the fifth"):
        list(DaliTrainLoader(folder, dataclasses.replace(TRAIN, workers=workers)).epoch(0))
    assert time.monotonic() - began < SECONDS
    assert all_ended(before)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("end", ENDS)
def test_threads_end_with_the_iterator(folder: Path, end: str, workers: int) -> None:
    before = tasks()
    iterators: list[Any] = [DaliTrainLoader(folder, dataclasses.replace(TRAIN, workers=workers)).epoch(0)]
    assert tasks() == before, "an epoch that is not begun has no threads"
    next(iterators[0])
    assert tasks() > before
    end_iterator(iterators, end, left=IMAGES // 3 - 1)
    assert all_ended(before)


def test_twenty_abandoned_epochs_leave_nothing_behind(folder: Path) -> None:
    loader = DaliTrainLoader(folder, TRAIN)
    next(loader.epoch(0))
    threads, memory = threading.active_count(), resident()
    for epoch in range(20):
        next(loader.epoch(epoch))
    assert threading.active_count() == threads
    assert resident() - memory < 64 << 20


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_two_epochs_at_a_time_do_not_meet(folder: Path) -> None:
    loader = DaliTrainLoader(folder, TRAIN)
    alone = [list(loader.epoch(epoch)) for epoch in range(2)]
    together = zip(loader.epoch(0), loader.epoch(1), strict=True)
    for step, batches in enumerate(together):
        for epoch, batch in enumerate(batches):
            assert torch.equal(batch.views_VBCHW, alone[epoch][step].views_VBCHW)


def test_a_program_that_abandons_an_epoch_ends(folder: Path) -> None:
    code = f"""
import pathlib
from tests.faults.test_dali_damage import TRAIN, DaliTrainLoader
loader = DaliTrainLoader(pathlib.Path({str(folder)!r}), TRAIN)
batches = loader.epoch(0)
print(len(next(batches).labels_B))
"""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=50
    )
    assert (result.returncode, result.stdout) == (0, "3\n"), result.stderr


@pytest.mark.parametrize("loader", [DaliTrainLoader, DaliEvalLoader])
def test_without_dali_the_error_says_how_to_install_it(
    folder: Path, loader: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(ConfigError, match=r"pip install 'pcl-fast\[dali\]'") as caught:
        loader(folder, TRAIN if loader is DaliTrainLoader else EVAL)
    assert "\n" not in str(caught.value)
