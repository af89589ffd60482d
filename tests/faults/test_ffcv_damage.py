"""A damaged sample never becomes other pixels: FFCV's loader raises, soon, and can be used again."""

import dataclasses
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pcl_fast.beton import open_beton
from pcl_fast.errors import DataError
from pcl_fast.manifest import manifest_path
from pipelines.normalisation import NORMALISATIONS
from pipelines.options import ImageEvalOptions, ImageTrainOptions
from tests.conftest import REPOSITORY
from tests.datasets_prep.pictures import ImageOptions, convert_folder, encoded, picture, write_folder

if find_spec("ffcv") is None:
    pytest.skip("ffcv is not installed: pip install 'pcl-fast[ffcv]'", allow_module_level=True)

from pipelines.ffcv_loader import FfcvEvalLoader, FfcvTrainLoader
from pipelines.ffcv_work import CheckedImages

BATCH, STEPS = 4, 8
COMMON: dict[str, Any] = {
    "batch_size": BATCH,
    "num_classes": 3,
    "normalisation": NORMALISATIONS["imagenet"],
    "device": torch.device("cpu"),
    "channels_last": True,
    "image_size": 16,
    "workers": 2,
}
OPTIONS = ImageTrainOptions(num_views=2, seed=0, **COMMON)
SOON = 5.0
BAD_STEP = 5

pytestmark = pytest.mark.timeout(40)


@pytest.fixture
def beton(tmp_path: Path) -> Path:
    convert_folder(write_folder(tmp_path / "source", images=BATCH * STEPS), tmp_path / "file.beton")
    return tmp_path / "file.beton"


def sample_of_batch(loader: FfcvTrainLoader, step: int) -> int:
    return int(loader.plan.batches(0)[step][1])


def overwrite(path: Path, sample: int, change: Any) -> None:
    """Change the stored bytes of a sample in place, by a function of them; their number stays."""
    with open_beton(path) as file:
        data, offset = bytes(file.encoded(sample)), int(file.offsets_N[sample])
    changed = change(bytearray(data))
    assert len(changed) == len(data)
    with path.open("r+b") as out:
        out.seek(offset)
        out.write(changed)


def run_until_it_fails(batches: Iterator[Any], error: type[BaseException] = DataError) -> tuple[int, str]:
    """How many batches came before the error, and its message; it comes soon and leaves no thread."""
    came: list[Any] = []
    before, begin = threading.active_count(), time.monotonic()
    with pytest.raises(error) as caught:
        came.extend(batches)
    assert time.monotonic() - begin < SOON
    assert threading.active_count() == before
    return len(came), str(caught.value)


def zeros_from(start: int) -> Any:
    return lambda data: data[:start] + bytes(len(data) - start)


def not_a_jpeg(data: bytearray) -> bytearray:
    return bytearray(np.random.default_rng(0).bytes(len(data)))


def another_size(data: bytearray) -> bytes:
    """A whole JPEG of other dimensions, with zeros behind it."""
    other = encoded(picture(5, width=40, height=30), quality=50)
    return other + bytes(len(data) - len(other))


def flipped(data: bytearray) -> bytearray:
    """One bit of the compressed pixels: other pixels, and nothing that a decoder could notice."""
    data[len(data) // 2] ^= 1
    return data


@pytest.mark.parametrize("how", ["decoder", "device"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (zeros_from(700), "Premature end of JPEG file"),
        (not_a_jpeg, "Not a JPEG file"),
        (another_size, "its size is another one"),
    ],
)
def test_without_checksums_the_decoder_tells(beton: Path, change: Any, said: str, how: Any) -> None:
    manifest_path(beton).unlink()
    loader = FfcvTrainLoader(beton, OPTIONS, how)
    bad = sample_of_batch(loader, BAD_STEP)
    overwrite(beton, bad, change)
    came, message = run_until_it_fails(loader.epoch(0))
    assert came == BAD_STEP, "the batches before it were whole"
    assert message.startswith(f"{beton}: sample {bad} is damaged")
    assert said in message
    assert "pcl-fast verify" in message
    assert "\n" not in message


@pytest.mark.parametrize("mode", ["jpg", "raw"])
def test_changed_bytes_are_found_by_their_checksum(tmp_path: Path, mode: Any) -> None:
    path = tmp_path / "file.beton"
    source = write_folder(tmp_path / "source", images=BATCH * STEPS)
    convert_folder(source, path, image=ImageOptions(mode=mode))
    loader = FfcvTrainLoader(path, OPTIONS)
    bad = sample_of_batch(loader, BAD_STEP)
    overwrite(path, bad, flipped)
    came, message = run_until_it_fails(loader.epoch(0))
    assert (came, "its checksum is wrong" in message) == (BAD_STEP, True)
    assert message.startswith(f"{path}: sample {bad} is damaged")
    assert run_until_it_fails(loader.epoch(0))[0] == BAD_STEP, "it is not forgotten"
    evaluation = FfcvEvalLoader(path, ImageEvalOptions(resize=20, **COMMON))
    assert run_until_it_fails(iter(evaluation))[0] == bad // BATCH

    overwrite(path, bad, flipped)  # as it was
    assert len(list(loader.epoch(0))) == STEPS
    assert len(list(evaluation)) == STEPS


def test_stray_bytes_are_damage_unless_a_checksum_vouches_for_them(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", images=BATCH)
    stray = source / "c0" / "0000.jpg"
    data = stray.read_bytes()
    assert data.endswith(b"\xff\xd9")
    stray.write_bytes(data[:-2] + b"stray" + data[-2:])
    path = tmp_path / "file.beton"
    convert_folder(source, path)
    with open_beton(path) as file:
        assert bytes(file.encoded(0)) == stray.read_bytes(), "the conversion kept it"
    options = dataclasses.replace(OPTIONS, image_size=64, scale=(1.0, 1.0), ratio=(1.0, 1.0), num_views=1)
    (batch,) = FfcvTrainLoader(path, options).epoch(0)
    place = batch.sample_ids_B.tolist().index(0)
    pixels = torch.from_numpy(np.array(Image.open(stray).convert("RGB"))) / 255
    assert float(pixels.std()) > 0.05
    mean = torch.tensor(NORMALISATIONS["imagenet"].mean)
    std = torch.tensor(NORMALISATIONS["imagenet"].std)
    # The centre 48 x 48, in the view of 64 x 64: the same picture, so the same mean colour, nearly.
    seen = batch.views_VBCHW[0, place].mean((1, 2)) * std + mean
    assert (seen - pixels[:, 8:56].mean((0, 1))).abs().max() < 1 / 255

    manifest_path(path).unlink()
    _, message = run_until_it_fails(FfcvTrainLoader(path, OPTIONS).epoch(0))
    assert "sample 0 is damaged (Corrupt JPEG data: " in message
    assert "extraneous bytes" in message


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt, StopIteration])
def test_whatever_is_raised_in_the_thread_is_raised_here(
    beton: Path, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def judge(images: CheckedImages, ids_B: Any, table: Any) -> None:
        calls.append(1)
        if len(calls) == BAD_STEP + 1:
            raise error("no more")
        original(images, ids_B, table)

    original = CheckedImages.judge
    monkeypatch.setattr(CheckedImages, "judge", judge)
    loader = FfcvTrainLoader(beton, OPTIONS)
    came, message = run_until_it_fails(loader.epoch(0), error if error is not StopIteration else RuntimeError)
    assert came == BAD_STEP
    assert error is StopIteration or message == "no more"
    assert len(list(loader.epoch(0))) == STEPS


def test_nobody_waits_for_a_consumer_that_stopped(beton: Path) -> None:
    """The thread is waiting for room when its iterator is closed, and when it is dropped."""
    loader = FfcvTrainLoader(beton, OPTIONS)
    before = threading.active_count()
    for _ in range(3):
        batches: Any = loader.epoch(0)
        next(batches)
        time.sleep(0.3)
        begin = time.monotonic()
        batches.close()
        assert time.monotonic() - begin < 1
        assert threading.active_count() == before


EXITS = """
import sys
from pathlib import Path
from tests.faults.test_ffcv_damage import OPTIONS, FfcvTrainLoader

batches = FfcvTrainLoader(Path(sys.argv[1]), OPTIONS).epoch(0)
next(batches)
sys.exit(5)
"""


def test_a_process_may_exit_in_the_middle_of_an_epoch(beton: Path) -> None:
    words = [sys.executable, "-c", EXITS, str(beton)]
    variables = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(words, env=variables, capture_output=True, text=True, timeout=35)
    assert (done.returncode, done.stderr) == (5, "")
