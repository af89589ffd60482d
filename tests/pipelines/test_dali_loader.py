"""DALI's loader: whatever the threads, ranks and resumptions, the same batches."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pcl_fast.contract import ViewBatch
from pcl_fast.errors import ConfigError, DataError
from pipelines.dali_loader import DaliEvalLoader, DaliTrainLoader
from tests.datasets_prep.pictures import convert_folder
from tests.pipelines.batches import assert_equal, by_sample
from tests.pipelines.dali_photos import EVAL, IMAGES, TRAIN, batches_of, write_photos

pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed: pip install 'pcl-fast[dali]'")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def whole(folder: Path) -> list[ViewBatch]:
    """Epoch 1, by two threads."""
    batches = batches_of(folder)
    assert [len(batch.labels_B) for batch in batches] == [6, 6, 6, 6, 3]
    return batches


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_the_evaluation_exactly(folder: Path, world_size: int) -> None:
    whole = torch.cat([batch.images_BCHW for batch in DaliEvalLoader(folder, EVAL)])
    options = [dataclasses.replace(EVAL, rank=rank, world_size=world_size) for rank in range(world_size)]
    parts = [batch.images_BCHW for rank in options for batch in DaliEvalLoader(folder, rank)]
    assert torch.equal(torch.cat(parts), whole)


def test_a_rank_may_have_no_image_to_evaluate(folder: Path) -> None:
    loader = DaliEvalLoader(folder, dataclasses.replace(EVAL, rank=0, world_size=IMAGES + 1))
    assert list(loader) == []
    assert loader.num_samples == IMAGES


@pytest.mark.parametrize("workers", [0, 1, 2, 4])
def test_threads_and_runs_change_nothing(folder: Path, whole: list[ViewBatch], workers: int) -> None:
    assert_equal(batches_of(folder, workers=workers), whole)


@pytest.mark.parametrize("step", [0, 1, 2, 4, 5])
def test_an_epoch_goes_on_from_any_step(folder: Path, whole: list[ViewBatch], step: int) -> None:
    assert_equal(batches_of(folder, first_step=step, workers=1), whole[step:])


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_each_batch(folder: Path, whole: list[ViewBatch], world_size: int) -> None:
    ranks = [
        batches_of(folder, batch_size=6 // world_size, world_size=world_size, rank=rank)
        for rank in range(world_size)
    ]
    for parts, batch in zip(zip(*ranks, strict=True), whole, strict=True):
        assert torch.equal(torch.cat([part.views_VBCHW for part in parts], 1), batch.views_VBCHW)
        assert torch.equal(torch.cat([part.sample_ids_B for part in parts]), batch.sample_ids_B)


def test_views_depend_on_seed_and_epoch(folder: Path, whole: list[ViewBatch]) -> None:
    first = by_sample(whole)
    large = [sample for sample, (views_VCHW, _) in first.items() if views_VCHW.std((2, 3)).max() > 0.01]
    assert len(large) == IMAGES - 1, "all but the picture of one pixel"
    for changed in (batches_of(folder, epoch=2), batches_of(folder, seed=8)):
        other = by_sample(changed)
        assert not any(torch.equal(first[sample][0], other[sample][0]) for sample in large)


@pytest.mark.parametrize("crops", ["ours", "library"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_type_and_layout(folder: Path, crops: str, channels_last: bool, dtype: torch.dtype) -> None:
    options: dict[str, Any] = {"channels_last": channels_last, "dtype": dtype, "crops": crops, "subset": 6}
    plain = batches_of(folder, crops=crops, subset=6)[0].views_VBCHW
    views = batches_of(folder, **options)[0].views_VBCHW
    assert torch.equal(views, plain.to(dtype))
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert views.flatten(0, 1).is_contiguous(memory_format=layout)


def test_batches_may_be_kept(folder: Path) -> None:
    kept, copies = list[ViewBatch](), list[ViewBatch]()
    for batch in DaliTrainLoader(folder, TRAIN).epoch(0):
        kept.append(batch)
        copies.append(ViewBatch(*(getattr(batch, field.name).clone() for field in dataclasses.fields(batch))))
    assert_equal(kept, copies)


def test_a_beton_gives_the_views_of_its_folder_in_any_order_of_pages(
    shared_data: Path, tmp_path: Path
) -> None:
    photos, path = shared_data / "imagenet-mini" / "val", tmp_path / "val.beton"
    convert_folder(photos, path, page_size=1 << 21)
    options = dataclasses.replace(TRAIN, num_classes=18, batch_size=16, order="pages", window_pages=2)
    loader = DaliTrainLoader(path, options)
    assert loader.source.page_of_N is not None
    assert len(np.unique(loader.source.page_of_N)) > options.window_pages
    views = by_sample(list(loader.epoch(0)))
    plain = by_sample(list(DaliTrainLoader(photos, dataclasses.replace(options, order="shuffled")).epoch(0)))
    assert views.keys() == plain.keys()
    same = sum(torch.equal(views[sample][0], plain[sample][0]) for sample in views)
    assert same > 0.5 * len(views), "photos that needed no shrinking are the same bytes"


def test_options_that_do_not_fit_are_refused(folder: Path) -> None:
    for loader, options in ((DaliTrainLoader, TRAIN), (DaliEvalLoader, EVAL)):
        with pytest.raises(DataError, match="but labels of 2 classes are 0 to 1"):
            loader(folder, dataclasses.replace(options, num_classes=2))  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=r"--data\.decode gpu: the device is cpu; give --device cuda"):
            loader(folder, dataclasses.replace(options, decode="gpu"))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="a folder has no pages"):
        DaliTrainLoader(folder, dataclasses.replace(TRAIN, order="pages"))
    with pytest.raises(ConfigError, match="step 6: it has 5 steps"):
        DaliTrainLoader(folder, TRAIN).epoch(0, 6)
