"""FFCV's loader: PIL's pixels, everybody's views, whatever the workers, the ranks and the step begun at."""

import dataclasses
import functools
import gc
import hashlib
import io
import os
import subprocess
import sys
import threading
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from datasets_prep.image_codec import ImageOptions
from pcl_fast.beton import JPG, RAW, open_beton
from pcl_fast.contract import EvalLoader, TrainLoader, ViewBatch
from pcl_fast.errors import ConfigError, DataError
from pipelines.boxes import CropRule, draw_boxes
from pipelines.normalisation import NORMALISATIONS
from pipelines.options import ImageEvalOptions, ImageTrainOptions
from pipelines.resample import reference_views
from pipelines.torch_loader import TorchEvalLoader, TorchTrainLoader
from pipelines.view_spec import ViewSpec
from tests.conftest import REPOSITORY
from tests.datasets_prep.pictures import convert_folder, encoded, picture, write_folder

if find_spec("ffcv") is None:
    pytest.skip("ffcv is not installed: pip install 'pcl-fast[ffcv]'", allow_module_level=True)

from pipelines.ffcv_loader import FfcvEvalLoader, FfcvTrainLoader
from pipelines.ffcv_work import Decoded, ViewsOnTheDevice

IMAGES, SIZE, VIEWS = 27, 20, 2
NORMALISATION = NORMALISATIONS["imagenet"]
LEVEL = 1 / 255 / min(NORMALISATION.std)
COMMON: dict[str, Any] = {
    "num_classes": 3,
    "normalisation": NORMALISATION,
    "device": torch.device("cpu"),
    "channels_last": True,
    "image_size": SIZE,
    "workers": 2,
}
TRAIN = ImageTrainOptions(batch_size=6, num_views=VIEWS, seed=7, drop_last=False, **COMMON)
EVAL = ImageEvalOptions(batch_size=6, resize=24, **COMMON)


def write_photos(folder: Path) -> Path:
    """Pictures of many shapes and kinds of JPEG in three classes."""
    write_folder(folder, images=IMAGES - 6, width=90, height=64)
    for number in range(0, IMAGES - 6, 3):
        tall = picture(number, width=31 + number, height=71)
        (folder / f"c{number % 3}" / f"{number:04}.jpg").write_bytes(encoded(tall))
    odd = [
        encoded(picture(90).convert("L")),
        encoded(picture(91, 77, 55), progressive=True),
        encoded(picture(92, 77, 55), subsampling=0),
        encoded(picture(93, 77, 55), subsampling=1, restart_marker_blocks=2),
        encoded(picture(94, 1, 1)),
        encoded(picture(95, 199, 2)),
    ]
    for number, data in enumerate(odd):
        (folder / "c2" / f"{9000 + number}.jpg").write_bytes(data)
    return folder


@pytest.fixture(scope="module")
def beton(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("photos")
    convert_folder(write_photos(path / "source"), path / "photos.beton")
    return path / "photos.beton"


@pytest.fixture(scope="module")
def smart(beton: Path) -> Path:
    """The same pictures, the smaller ones as raw pixels."""
    path = beton.with_name("smart.beton")
    image = ImageOptions(mode="smart", smart_threshold=31 * 90 * 3)
    convert_folder(beton.parent / "source", path, image=image)
    with open_beton(path) as file:
        assert set(file.modes_N.tolist()) == {JPG, RAW}
    return path


def pixels_by_pil(path: Path) -> list[Tensor]:
    with open_beton(path) as file:
        found: list[Tensor] = []
        for sample in range(file.num_samples):
            data, size = bytes(file.encoded(sample)), tuple(file.sizes_N2[sample].tolist())
            if file.modes_N[sample] == RAW:
                image = np.frombuffer(data, np.uint8).reshape(*size, 3).copy()
            else:
                image = np.array(Image.open(io.BytesIO(data)).convert("RGB"))
            assert image.shape[:2] == size
            found.append(torch.from_numpy(image))
        return found


@functools.cache
def opened(path: Path, options: ImageTrainOptions, how: Any) -> TrainLoader:
    """Opening compiles; a loader may be used again and again."""
    return FfcvTrainLoader(path, options, how)


@functools.cache
def opened_to_evaluate(path: Path, options: ImageEvalOptions = EVAL) -> EvalLoader:
    return FfcvEvalLoader(path, options)


def batches_of(path: Path, epoch: int = 1, first_step: int = 0, **changes: Any) -> list[ViewBatch]:
    how = changes.pop("make_views", "auto")
    loader = opened(path, dataclasses.replace(TRAIN, **changes), how)
    return list(loader.epoch(epoch, first_step))


def by_sample(batches: list[ViewBatch]) -> dict[int, tuple[Tensor, int]]:
    """Views [V, C, H, W] and label of each sample; no sample comes twice."""
    found = {
        int(sample): (batch.views_VBCHW[:, place], int(batch.labels_B[place]))
        for batch in batches
        for place, sample in enumerate(batch.sample_ids_B)
    }
    assert len(found) == sum(len(batch.labels_B) for batch in batches)
    return found


def assert_equal(some: list[ViewBatch], others: list[ViewBatch]) -> None:
    assert len(some) == len(others)
    for one, other in zip(some, others, strict=True):
        for field in dataclasses.fields(one):
            assert torch.equal(getattr(one, field.name), getattr(other, field.name)), field.name


@pytest.mark.parametrize("kind", ["beton", "smart"])
def test_pixels_are_those_of_pil(
    kind: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = request.getfixturevalue(kind)
    seen: list[Decoded] = []

    def serve(work: ViewsOnTheDevice, made: Decoded) -> Any:
        seen.append(made)
        return original(work, made)

    original = ViewsOnTheDevice.serve
    monkeypatch.setattr(ViewsOnTheDevice, "serve", serve)
    assert len(batches_of(path, make_views="device")) == 5
    expected, found = pixels_by_pil(path), 0
    for batch in seen:
        for image, (height, width), sample in zip(
            batch.images_BHWC, batch.sizes_B2.tolist(), batch.ids_B.tolist(), strict=True
        ):
            assert torch.equal(image[:height, :width], expected[sample]), sample
            found += 1
    assert found == IMAGES


@pytest.mark.parametrize("kind", ["beton", "smart"])
def test_views_are_the_references_of_the_drawn_boxes(kind: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(kind)
    views = by_sample(batches_of(path))
    labels = open_beton(path).labels_N
    spec = ViewSpec(normalisation=NORMALISATION, size=SIZE)
    for sample, image in enumerate(pixels_by_pil(path)):
        boxes = draw_boxes(torch.tensor([image.shape[:2]]), torch.tensor([sample]), VIEWS, 7, 1, CropRule())
        expected = reference_views(image.unsqueeze(0), boxes, spec)[:, 0]
        assert (views[sample][0] - expected).abs().max() < 1e-4
        assert views[sample][1] == labels[sample]


def test_views_are_the_torch_loaders_to_the_last_digit_of_a_byte(beton: Path) -> None:
    theirs = by_sample(list(TorchTrainLoader(beton, dataclasses.replace(TRAIN, workers=0)).epoch(1)))
    ours = by_sample(batches_of(beton))
    assert ours.keys() == theirs.keys() == set(range(IMAGES))
    for sample, (views, label) in theirs.items():
        assert (ours[sample][0] - views).abs().max() <= 1.01 * LEVEL
        assert ours[sample][1] == label


def test_evaluation_is_the_torch_loaders_and_every_sample_comes_once(beton: Path) -> None:
    loader = opened_to_evaluate(beton)
    batches = list(loader)
    assert [len(batch.labels_B) for batch in batches] == [6, 6, 6, 6, 3]
    assert loader.num_samples == IMAGES
    for ours, theirs in zip(
        batches, TorchEvalLoader(beton, dataclasses.replace(EVAL, workers=0)), strict=True
    ):
        assert (ours.images_BCHW - theirs.images_BCHW).abs().max() <= 1.01 * LEVEL
        assert torch.equal(ours.labels_B, theirs.labels_B)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_the_evaluation_exactly(beton: Path, world_size: int) -> None:
    whole = torch.cat([batch.images_BCHW for batch in opened_to_evaluate(beton)])
    options = [dataclasses.replace(EVAL, rank=rank, world_size=world_size) for rank in range(world_size)]
    parts = [batch.images_BCHW for rank in options for batch in FfcvEvalLoader(beton, rank)]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_it_does_not_matter_who_makes_the_views(beton: Path, channels_last: bool, dtype: torch.dtype) -> None:
    plain = batches_of(beton)
    found = [
        batches_of(beton, make_views=how, channels_last=channels_last, dtype=dtype)
        for how in ("decoder", "device")
    ]
    assert_equal(*found)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    for batch, expected in zip(found[0], plain, strict=True):
        assert torch.equal(batch.views_VBCHW, expected.views_VBCHW.to(dtype))
        assert batch.views_VBCHW.flatten(0, 1).is_contiguous(memory_format=layout)


HASHES = """
import hashlib, sys
from pathlib import Path
from tests.pipelines.test_ffcv_loader import batches_of, digest

for workers in (1, 2, 4):
    print(workers, digest(batches_of(Path(sys.argv[1]), workers=workers)))
"""


def digest(batches: list[ViewBatch]) -> str:
    found = hashlib.sha256()
    for batch in batches:
        for tensor in (batch.views_VBCHW, batch.labels_B, batch.sample_ids_B):
            found.update(tensor.contiguous().numpy().tobytes())
    return found.hexdigest()


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


@pytest.mark.parametrize("end", ["exhaust", "close", "drop", "raise"])
def test_the_thread_ends_with_the_iterator(beton: Path, end: str) -> None:
    before = threading.active_count()
    iterator: Any = opened(beton, TRAIN, "auto").epoch(0)
    assert threading.active_count() == before, "an epoch not begun has no thread"
    next(iterator)
    assert threading.active_count() == before + 1
    match end:
        case "exhaust":
            assert len(list(iterator)) == 4
        case "close":
            iterator.close()
        case "drop":
            del iterator
            gc.collect()
        case _:
            with pytest.raises(KeyError):
                iterator.throw(KeyError())
    assert threading.active_count() == before


def test_abandoned_iterators_leave_nothing_behind(beton: Path) -> None:
    torch.set_num_threads(2)
    loader, evaluation = FfcvTrainLoader(beton, TRAIN), FfcvEvalLoader(beton, EVAL)
    threads: list[int] = []
    for epoch in range(20):
        next(loader.epoch(epoch))
        next(iter(evaluation))
        threads.append(native_threads())
    assert max(threads) - min(threads) <= 1, "one may not be quite gone yet"
    assert torch.get_num_threads() == 2


def test_options_that_do_not_fit_are_refused(beton: Path) -> None:
    with pytest.raises(DataError, match="but labels of 2 classes are 0 to 1"):
        FfcvTrainLoader(beton, dataclasses.replace(TRAIN, num_classes=2))
    with pytest.raises(DataError, match="but labels of 2 classes are 0 to 1"):
        FfcvEvalLoader(beton, dataclasses.replace(EVAL, num_classes=2))
    with pytest.raises(ConfigError, match="step 6: it has 5 steps"):
        opened(beton, TRAIN, "auto").epoch(0, 6)
    with pytest.raises(DataError, match=r"absent\.beton cannot be opened"):
        FfcvTrainLoader(beton.with_name("absent.beton"), TRAIN)


def test_without_a_compiler_views_are_left_to_torch(beton: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = batches_of(beton)
    monkeypatch.setattr("pipelines.views_cpu.why_unavailable", lambda: "no compiler")
    for batch, compiled in zip(FfcvTrainLoader(beton, TRAIN).epoch(1), expected, strict=True):
        assert (batch.views_VBCHW - compiled.views_VBCHW).abs().max() < 1e-4


def test_real_photos_in_page_order(shared_data: Path, tmp_path: Path) -> None:
    path = tmp_path / "val.beton"
    convert_folder(shared_data / "imagenet-mini" / "val", path, page_size=1 << 21)
    options = dataclasses.replace(
        TRAIN, num_classes=18, batch_size=16, order="pages", window_pages=2, image_size=64
    )
    ours = by_sample(list(FfcvTrainLoader(path, options).epoch(0)))
    theirs = by_sample(list(TorchTrainLoader(path, dataclasses.replace(options, workers=0)).epoch(0)))
    assert list(ours) == list(theirs)
    for sample, (views, label) in theirs.items():
        assert (ours[sample][0] - views).abs().max() <= 1.01 * LEVEL
        assert ours[sample][1] == label
