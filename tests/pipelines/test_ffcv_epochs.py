"""FFCV's epochs: the same whatever the workers, the ranks and the step begun at; they end without a trace."""

import dataclasses
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from pcl_fast.contract import ViewBatch
from tests.conftest import REPOSITORY
from tests.pipelines.batches import ENDS, assert_equal, by_sample, end_iterator
from tests.pipelines.ffcv_photos import (
    EVAL,
    IMAGES,
    TRAIN,
    FfcvEvalLoader,
    FfcvTrainLoader,
    batches_of,
    convert_photos,
    digest,
    opened,
    opened_to_evaluate,
)

HASHES = """
import hashlib, sys
from pathlib import Path
from tests.pipelines.ffcv_photos import batches_of, digest

for workers in (1, 2, 4):
    print(workers, digest(batches_of(Path(sys.argv[1]), workers=workers)))
"""


@pytest.fixture(scope="module")
def beton(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert_photos(tmp_path_factory.mktemp("photos"))


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_the_evaluation_exactly(beton: Path, world_size: int) -> None:
    whole = torch.cat([batch.images_BCHW for batch in opened_to_evaluate(beton)])
    options = [dataclasses.replace(EVAL, rank=rank, world_size=world_size) for rank in range(world_size)]
    parts = [batch.images_BCHW for rank in options for batch in FfcvEvalLoader(beton, rank)]
    assert torch.equal(torch.cat(parts), whole)


def test_a_rank_may_have_no_image_to_evaluate(beton: Path) -> None:
    loader = FfcvEvalLoader(beton, dataclasses.replace(EVAL, rank=0, world_size=IMAGES + 1))
    assert list(loader) == []
    assert loader.num_samples == IMAGES


def test_workers_change_nothing_nor_does_another_process(beton: Path) -> None:
    # OpenMP has as many threads as it is asked for, TBB no more than there are cores.
    threads = {"NUMBA_NUM_THREADS": "4", "NUMBA_THREADING_LAYER": "omp"}
    variables = {**os.environ, **threads, "PYTHONPATH": str(REPOSITORY)}
    words = [sys.executable, "-c", HASHES, str(beton)]
    done = subprocess.run(words, env=variables, capture_output=True, text=True, timeout=50)
    assert done.returncode == 0, done.stderr
    expected = digest(batches_of(beton, workers=0))
    assert done.stdout.splitlines() == [f"{workers} {expected}" for workers in (1, 2, 4)]
    assert done.stderr == ""


def test_views_depend_on_seed_and_epoch(beton: Path) -> None:
    first = by_sample(batches_of(beton))
    tiny = {IMAGES - 2, IMAGES - 1}  # of one pixel and of two rows: few crops differ
    for changed in (batches_of(beton, epoch=2), batches_of(beton, seed=8)):
        other = by_sample(changed)
        same = {sample for sample in range(IMAGES) if torch.equal(first[sample][0], other[sample][0])}
        assert same <= tiny
    assert not torch.equal(*first[0][0])


@pytest.mark.parametrize("step", [0, 1, 2, 4, 5])
def test_an_epoch_goes_on_from_any_step(beton: Path, step: int) -> None:
    whole = batches_of(beton)
    assert len(whole) == 5
    assert_equal(batches_of(beton, first_step=step), whole[step:])


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_each_batch(beton: Path, world_size: int) -> None:
    ranks = [
        batches_of(beton, batch_size=6 // world_size, world_size=world_size, rank=rank)
        for rank in range(world_size)
    ]
    for parts, whole in zip(zip(*ranks, strict=True), batches_of(beton), strict=True):
        assert torch.equal(torch.cat([part.views_VBCHW for part in parts], 1), whole.views_VBCHW)
        assert torch.equal(torch.cat([part.sample_ids_B for part in parts]), whole.sample_ids_B)


def test_two_epochs_at_once_do_not_disturb_each_other(beton: Path) -> None:
    loader = opened(beton, TRAIN, "auto")
    pairs = list(zip(loader.epoch(1), loader.epoch(2), opened_to_evaluate(beton), strict=True))
    assert_equal([one for one, _, _ in pairs], batches_of(beton))
    assert_equal([two for _, two, _ in pairs], batches_of(beton, epoch=2))


@pytest.mark.parametrize("how", ["decoder", "device"])
def test_batches_may_be_kept(beton: Path, how: Any) -> None:
    kept: list[ViewBatch] = []
    copies: list[ViewBatch] = []
    loader = opened(beton, TRAIN, how)
    for epoch in range(3):
        for batch in loader.epoch(epoch):
            kept.append(batch)
            copies.append(
                ViewBatch(batch.views_VBCHW.clone(), batch.labels_B.clone(), batch.sample_ids_B.clone())
            )
        del kept[::2], copies[::2]  # their memory is used again
    assert_equal(kept, copies)


def native_threads() -> int:
    return len(os.listdir("/proc/self/task"))


@pytest.mark.parametrize("end", ENDS)
def test_the_thread_ends_with_the_iterator(beton: Path, end: str) -> None:
    before = threading.active_count()
    iterators: list[Any] = [opened(beton, TRAIN, "auto").epoch(0)]
    assert threading.active_count() == before, "an epoch not begun has no thread"
    next(iterators[0])
    assert threading.active_count() == before + 1
    end_iterator(iterators, end, left=4)
    assert threading.active_count() == before


def test_abandoned_iterators_leave_nothing_behind(beton: Path) -> None:
    torch.set_num_threads(2)
    loader, evaluation = FfcvTrainLoader(beton, TRAIN), FfcvEvalLoader(beton, EVAL)
    next(loader.epoch(0))
    python, native = threading.active_count(), native_threads()
    for epoch in range(20):
        next(loader.epoch(epoch))
        next(iter(evaluation))
    assert threading.active_count() == python
    deadline = time.monotonic() + 5  # the system takes a while to see a thread off
    while native_threads() > native and time.monotonic() < deadline:
        time.sleep(0.01)
    assert native_threads() <= native
    assert torch.get_num_threads() == 2
