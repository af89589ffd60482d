"""What goes wrong in a loader's workers is raised where the batches are used, soon; nothing stays behind."""

import dataclasses
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pcl_fast.errors import DataError, PclError
from pipelines.images import ImageFolder, decode
from pipelines.normalisation import NORMALISATIONS
from pipelines.options import ImageEvalOptions, ImageTrainOptions
from pipelines.torch_loader import TorchEvalLoader, TorchTrainLoader
from pipelines.workers import POLL_SECONDS
from tests.datasets_prep.pictures import write_folder

BATCH, STEPS = 4, 8
COMMON: dict[str, Any] = {
    "batch_size": BATCH,
    "num_classes": 3,
    "normalisation": NORMALISATIONS["imagenet"],
    "device": torch.device("cpu"),
    "channels_last": True,
    "image_size": 16,
}
OPTIONS = ImageTrainOptions(num_views=2, seed=0, **COMMON)
SOON = 5.0
EXIT_CODES = {"exits": 3, "is killed": -9}

pytestmark = pytest.mark.timeout(30)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path, images=BATCH * STEPS)


def loader(folder: Path, workers: int) -> TorchTrainLoader:
    return TorchTrainLoader(folder, dataclasses.replace(OPTIONS, workers=workers))


def sample_of_batch(folder: Path, step: int) -> int:
    return int(loader(folder, 0).plan.batches(0)[step][0])


def file_of(folder: Path, sample: int) -> Path:
    return sorted(folder.glob("*/*.jpg"))[sample]


def run_until_it_fails(batches: Iterator[Any], error: type[Exception]) -> tuple[int, str]:
    """How many batches came before the error, and its message; it comes soon and leaves no process."""
    came: list[Any] = []
    begin = time.monotonic()
    with pytest.raises(error) as caught:
        came.extend(batches)
    assert time.monotonic() - begin < SOON
    assert multiprocessing.active_children() == []
    return len(came), str(caught.value)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_damaged_image_ends_the_epoch_at_its_batch(folder: Path, workers: int) -> None:
    file = file_of(folder, sample_of_batch(folder, 5))
    file.write_bytes(file.read_bytes()[:400])
    came, message = run_until_it_fails(loader(folder, workers).epoch(0), DataError)
    assert came == 5, "the batches before it were whole"
    assert message.startswith(str(file))
    assert "\n" not in message


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_image_ends_an_evaluation(folder: Path, workers: int) -> None:
    file = file_of(folder, 21)
    file.write_bytes(b"")
    source = TorchEvalLoader(folder, ImageEvalOptions(workers=workers, resize=18, **COMMON))
    came, message = run_until_it_fails(iter(source), DataError)
    assert came == 5
    assert message.startswith(str(file))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bug_in_a_worker_is_raised_as_what_it_is(
    folder: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = sample_of_batch(folder, 5)

    def decode_or_fail(source: Any, sample: int) -> Any:
        return decode(source, sample if sample != bad else 1 // 0)

    monkeypatch.setattr("pipelines.torch_loader.decode", decode_or_fail)
    _, message = run_until_it_fails(loader(folder, workers).epoch(0), ZeroDivisionError)
    assert "by zero" in message


@pytest.mark.parametrize("how", ["exits", "is killed"])
def test_a_dead_worker_is_an_error(folder: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bad, whole = sample_of_batch(folder, 5), ImageFolder.open

    def open_or_die(self: ImageFolder, sample: int) -> Any:
        if sample == bad:
            os._exit(EXIT_CODES[how]) if how == "exits" else os.kill(os.getpid(), signal.SIGKILL)
        return whole(self, sample)

    monkeypatch.setattr(ImageFolder, "open", open_or_die)
    _, message = run_until_it_fails(loader(folder, 2).epoch(0), PclError)
    assert message.startswith("a worker of the loader died (")
    # Its connection may break a moment before it has ended.
    assert f"exit code {EXIT_CODES[how]}" in message or "its connection broke: " in message
    assert "\n" not in message


def test_a_slow_worker_is_waited_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow, whole = sample_of_batch(folder, 0), ImageFolder.open

    def open_late(self: ImageFolder, sample: int) -> Any:
        time.sleep(2.5 * POLL_SECONDS if sample == slow else 0)
        return whole(self, sample)

    monkeypatch.setattr(ImageFolder, "open", open_late)
    ids = [batch.sample_ids_B.tolist() for batch in loader(folder, 2).epoch(0)]
    assert ids == [batch.tolist() for batch in loader(folder, 0).plan.batches(0)]


def test_signals_to_the_whole_group_leave_the_workers_to_the_trainer(folder: Path) -> None:
    iterator = loader(folder, 2).epoch(0)
    next(iterator)
    for child in multiprocessing.active_children():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            assert child.pid is not None
            os.kill(child.pid, number)
    assert len(list(iterator)) == STEPS - 1
    assert multiprocessing.active_children() == []
