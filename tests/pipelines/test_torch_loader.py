"""The straightforward loader: PIL's and torchvision's views, whatever the workers, ranks and resumptions."""

import dataclasses
import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from pcl_fast.contract import EvalLoader, TrainLoader, ViewBatch
from pcl_fast.errors import ConfigError, DataError
from pipelines.boxes import CropRule, draw_boxes
from pipelines.normalisation import NORMALISATIONS
from pipelines.options import ImageEvalOptions, ImageTrainOptions
from pipelines.torch_loader import TorchEvalLoader, TorchTrainLoader
from tests.datasets_prep.pictures import convert_folder, encoded, picture, write_folder
from tests.pipelines.batches import ENDS, assert_equal, by_sample, end_iterator
from tests.pipelines.pictures import by_pil

IMAGES, SIZE, VIEWS = 27, 20, 2
NORMALISATION = NORMALISATIONS["imagenet"]
LEVEL = 1 / 255 / min(NORMALISATION.std)
COMMON: dict[str, Any] = {
    "num_classes": 3,
    "normalisation": NORMALISATION,
    "device": torch.device("cpu"),
    "channels_last": False,
    "image_size": SIZE,
}
TRAIN = ImageTrainOptions(batch_size=6, num_views=VIEWS, seed=7, drop_last=False, **COMMON)
EVAL = ImageEvalOptions(batch_size=6, resize=24, **COMMON)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of many shapes in three classes, the last of them odd kinds."""
    path = tmp_path_factory.mktemp("photos")
    write_folder(path, images=IMAGES - 2, width=90, height=64)
    for number in range(0, IMAGES - 2, 3):
        tall = picture(number, width=30 + number, height=70)
        (path / f"c{number % 3}" / f"{number:04}.jpg").write_bytes(encoded(tall))
    (path / "c2" / "0090.jpg").write_bytes(encoded(picture(90).convert("L")))
    (path / "c2" / "0091.jpg").write_bytes(encoded(picture(91).convert("CMYK")))
    return path


@pytest.fixture(scope="module")
def beton(folder: Path) -> Path:
    path = folder.parent / f"{folder.name}.beton"
    convert_folder(folder, path)
    return path


def batches_of(path: Path, epoch: int = 1, first_step: int = 0, **changes: Any) -> list[ViewBatch]:
    loader: TrainLoader = TorchTrainLoader(path, dataclasses.replace(TRAIN, **changes))
    return list(loader.epoch(epoch, first_step))


def test_views_are_pils_of_the_drawn_boxes(folder: Path) -> None:
    views = by_sample(batches_of(folder))
    files = ImageFolder(str(folder)).samples
    assert views.keys() == set(range(IMAGES))
    mean, std = (torch.tensor(part).view(3, 1, 1) for part in (NORMALISATION.mean, NORMALISATION.std))
    for sample, (views_VCHW, label) in views.items():
        path, expected_label = files[sample]
        assert label == expected_label
        image = torch.from_numpy(np.array(Image.open(path).convert("RGB")))
        boxes = draw_boxes(torch.tensor([image.shape[:2]]), torch.tensor([sample]), VIEWS, 7, 1, CropRule())
        for view in range(VIEWS):
            box, flip = boxes.boxes_VB4[view, 0].tolist(), bool(boxes.flip_VB[view, 0])
            expected = (by_pil(image, box, flip, SIZE) / 255 - mean) / std
            assert (views_VCHW[view] - expected).abs().max() <= 1.01 * LEVEL  # the last digit of a byte


def test_evaluation_is_torchvisions_recipe_and_every_sample_comes_once(folder: Path) -> None:
    recipe = v2.Compose(
        [
            v2.Resize(24),
            v2.CenterCrop(SIZE),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(NORMALISATION.mean, NORMALISATION.std),
        ]
    )
    files = ImageFolder(str(folder), transform=recipe)
    loader: EvalLoader = TorchEvalLoader(folder, dataclasses.replace(EVAL, workers=2))
    batches = list(loader)
    assert [len(batch.labels_B) for batch in batches] == [6, 6, 6, 6, 3]
    assert loader.num_samples == IMAGES
    images = torch.cat([batch.images_BCHW for batch in batches])
    labels = torch.cat([batch.labels_B for batch in batches])
    assert labels.tolist() == [label for _, label in files]
    for sample, image in enumerate(images):
        assert (image - files[sample][0]).abs().max() <= 1.01 * LEVEL


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_share_the_evaluation_exactly(folder: Path, world_size: int) -> None:
    whole = torch.cat([batch.images_BCHW for batch in TorchEvalLoader(folder, EVAL)])
    options = [dataclasses.replace(EVAL, rank=rank, world_size=world_size) for rank in range(world_size)]
    parts = [batch.images_BCHW for rank in options for batch in TorchEvalLoader(folder, rank)]
    assert torch.equal(torch.cat(parts), whole)


def test_a_rank_may_have_no_image_to_evaluate(folder: Path) -> None:
    loader = TorchEvalLoader(folder, dataclasses.replace(EVAL, rank=0, world_size=IMAGES + 1))
    assert list(loader) == []
    assert loader.num_samples == IMAGES


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_workers_change_nothing(folder: Path, workers: int) -> None:
    assert_equal(batches_of(folder, workers=workers), batches_of(folder))


def test_a_beton_gives_the_views_of_its_folder(folder: Path, beton: Path) -> None:
    ours, theirs = by_sample(batches_of(beton, workers=1)), by_sample(batches_of(folder))
    cmyk = IMAGES - 1  # no decoder of .beton files reads it, so it was encoded again
    for sample in range(IMAGES):
        assert ours[sample][1] == theirs[sample][1]
        assert torch.equal(ours[sample][0], theirs[sample][0]) == (sample != cmyk)


def test_views_depend_on_seed_and_epoch(folder: Path) -> None:
    first = by_sample(batches_of(folder))
    for changed in (batches_of(folder, epoch=2), batches_of(folder, seed=8)):
        other = by_sample(changed)
        assert not any(torch.equal(first[sample][0], other[sample][0]) for sample in range(IMAGES))
    views_VCHW = first[0][0]
    assert not torch.equal(views_VCHW[0], views_VCHW[1])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("step", [0, 1, 2, 4, 5])
def test_an_epoch_goes_on_from_any_step(folder: Path, step: int, workers: int) -> None:
    whole = batches_of(folder)
    assert len(whole) == 5
    assert_equal(batches_of(folder, first_step=step, workers=workers), whole[step:])


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_each_batch(folder: Path, world_size: int) -> None:
    ranks = [
        batches_of(folder, batch_size=6 // world_size, world_size=world_size, rank=rank)
        for rank in range(world_size)
    ]
    for parts, whole in zip(zip(*ranks, strict=True), batches_of(folder), strict=True):
        assert torch.equal(torch.cat([part.views_VBCHW for part in parts], 1), whole.views_VBCHW)
        assert torch.equal(torch.cat([part.sample_ids_B for part in parts]), whole.sample_ids_B)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_type_and_layout_are_those_asked_for(folder: Path, channels_last: bool, dtype: torch.dtype) -> None:
    plain = batches_of(folder)[0].views_VBCHW
    views = batches_of(folder, channels_last=channels_last, dtype=dtype)[0].views_VBCHW
    assert torch.equal(views, plain.to(dtype))
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert views.flatten(0, 1).is_contiguous(memory_format=layout)


def test_batches_may_be_kept(folder: Path) -> None:
    kept: list[ViewBatch] = []
    copies: list[ViewBatch] = []
    for batch in TorchTrainLoader(folder, dataclasses.replace(TRAIN, workers=1)).epoch(0):
        kept.append(batch)
        copies.append(
            ViewBatch(batch.views_VBCHW.clone(), batch.labels_B.clone(), batch.sample_ids_B.clone())
        )
    assert_equal(kept, copies)


@pytest.mark.parametrize("end", ENDS)
def test_workers_end_with_the_iterator(folder: Path, end: str) -> None:
    iterators: list[Any] = [TorchTrainLoader(folder, dataclasses.replace(TRAIN, workers=2)).epoch(0)]
    next(iterators[0])
    assert len(multiprocessing.active_children()) == 2
    end_iterator(iterators, end, left=4)
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("workers", [0, 1])
def test_nobodys_random_numbers_are_used(folder: Path, workers: int) -> None:
    before = torch.get_rng_state()
    assert len(batches_of(folder, workers=workers)) == 5
    assert torch.equal(torch.get_rng_state(), before)


def test_an_epoch_not_begun_starts_no_workers(folder: Path) -> None:
    iterator = TorchTrainLoader(folder, dataclasses.replace(TRAIN, workers=2)).epoch(0)
    assert multiprocessing.active_children() == []
    del iterator


def test_options_that_do_not_fit_are_refused(folder: Path) -> None:
    with pytest.raises(DataError, match="but labels of 2 classes are 0 to 1"):
        TorchTrainLoader(folder, dataclasses.replace(TRAIN, num_classes=2))
    with pytest.raises(DataError, match="but labels of 2 classes are 0 to 1"):
        TorchEvalLoader(folder, dataclasses.replace(EVAL, num_classes=2))
    with pytest.raises(ConfigError, match="a folder has no pages"):
        TorchTrainLoader(folder, dataclasses.replace(TRAIN, order="pages"))
    with pytest.raises(ConfigError, match="step 6: it has 5 steps"):
        TorchTrainLoader(folder, TRAIN).epoch(0, 6)
    for changes in (
        {"workers": -1},
        {"rank": 1},
        {"dtype": torch.float16},
        {"scale": (0.5, 0.1)},
        {"subset": 0},
    ):
        with pytest.raises(ConfigError, match="of a loader is"):
            dataclasses.replace(TRAIN, **changes)
    with pytest.raises(ConfigError, match="resize of a loader is 19: it must be at least 20"):
        dataclasses.replace(EVAL, resize=19)


def test_real_photos_in_page_order(shared_data: Path, tmp_path: Path) -> None:
    photos = shared_data / "imagenet-mini" / "val"
    path = tmp_path / "val.beton"
    convert_folder(photos, path, page_size=1 << 21)
    options = dataclasses.replace(
        TRAIN, num_classes=18, batch_size=16, order="pages", window_pages=2, image_size=64
    )
    loader = TorchTrainLoader(path, options)
    assert loader.source.page_of_N is not None
    assert len(np.unique(loader.source.page_of_N)) > options.window_pages
    views = by_sample(list(loader.epoch(0)))
    plain = by_sample(list(TorchTrainLoader(photos, dataclasses.replace(options, order="shuffled")).epoch(0)))
    same = [torch.equal(views[sample][0], plain[sample][0]) for sample in range(loader.num_samples)]
    assert views.keys() == plain.keys()
    assert sum(same) > 0.5 * len(same), "photos that needed no shrinking are the same bytes"
