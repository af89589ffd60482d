"""DALI on a CUDA device: decoded there or here, cropped by our kernels or by DALI, on streams of its own."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from pcl_fast.contract import ViewBatch
from pipelines.dali_loader import DaliEvalLoader, DaliTrainLoader
from pipelines.normalisation import NORMALISATIONS
from pipelines.options import ImageEvalOptions, ImageTrainOptions
from tests.pipelines.batches import assert_equal
from tests.pipelines.dali_photos import write_photos

pytestmark = pytest.mark.gpu
pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed: pip install 'pcl-fast[dali]'")

NORMALISATION = NORMALISATIONS["imagenet"]
COMMON: dict[str, Any] = {
    "num_classes": 3,
    "normalisation": NORMALISATION,
    "device": torch.device("cuda"),
    "channels_last": True,
    "image_size": 32,
    "workers": 2,
}
TRAIN = ImageTrainOptions(batch_size=6, num_views=3, seed=7, drop_last=False, **COMMON)
EVAL = ImageEvalOptions(batch_size=6, resize=36, **COMMON)
ON_CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos"))


def batches_of(path: Path, epoch: int = 1, first_step: int = 0, **changes: Any) -> list[ViewBatch]:
    return list(DaliTrainLoader(path, dataclasses.replace(TRAIN, **changes)).epoch(epoch, first_step))


def levels(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Differences of normalised images in gray levels, on the CPU."""
    std = torch.tensor(NORMALISATION.std).view(3, 1, 1)
    return (one.float().cpu() - other.float().cpu()).abs() * std * 255


def test_pixels_decoded_on_the_host_give_the_views_of_the_cpu(folder: Path) -> None:
    for mine, other in zip(batches_of(folder, decode="cpu"), batches_of(folder, device=ON_CPU), strict=True):
        assert mine.views_VBCHW.is_cuda
        assert torch.equal(mine.sample_ids_B.cpu(), other.sample_ids_B)
        assert torch.equal(mine.labels_B.cpu(), other.labels_B)
        assert levels(mine.views_VBCHW, other.views_VBCHW).max() <= 0.01


@pytest.mark.parametrize("crops", ["ours", "library"])
def test_pixels_decoded_on_the_device_are_near_those_of_the_host(folder: Path, crops: str) -> None:
    """Its inverse transform rounds differently: by a gray level here and there."""
    mine, other = batches_of(folder, decode="gpu", crops=crops), batches_of(folder, decode="cpu", crops=crops)
    for one, two in zip(mine, other, strict=True):
        difference = levels(one.views_VBCHW, two.views_VBCHW)
        assert difference.mean() <= 1.0
        assert difference.max() <= 16


def test_evaluation_is_that_of_the_cpu(folder: Path) -> None:
    mine = list(DaliEvalLoader(folder, dataclasses.replace(EVAL, decode="cpu")))
    other = list(DaliEvalLoader(folder, dataclasses.replace(EVAL, device=ON_CPU)))
    for one, two in zip(mine, other, strict=True):
        assert levels(one.images_BCHW, two.images_BCHW).max() <= 0.01
        assert torch.equal(one.labels_B.cpu(), two.labels_B)


@pytest.mark.parametrize("decode", ["cpu", "gpu"])
def test_threads_and_resumption_change_nothing(folder: Path, decode: str) -> None:
    whole = batches_of(folder, decode=decode)
    assert_equal(batches_of(folder, decode=decode, workers=0), whole)
    assert_equal(batches_of(folder, decode=decode, first_step=2, workers=3), whole[2:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("crops", ["ours", "library"])
def test_type_and_layout(folder: Path, crops: str, dtype: torch.dtype) -> None:
    views = batches_of(folder, crops=crops, dtype=dtype)[0].views_VBCHW
    assert views.dtype == dtype
    assert views.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)


def test_batches_may_be_kept_while_a_busy_stream_of_the_consumers_reads_them(folder: Path) -> None:
    expected = [batch.views_VBCHW.cpu() for batch in batches_of(folder)]
    stream, kept = torch.cuda.Stream(), list[torch.Tensor]()
    weights = torch.randn(4096, 4096, device="cuda")
    with torch.cuda.stream(stream):
        for batch in DaliTrainLoader(folder, TRAIN).epoch(1):
            for _ in range(10):  # so that the views are read long after the next ones are begun
                weights = weights @ weights / 64
            kept.append(batch.views_VBCHW.clone())
            del batch
    stream.synchronize()
    for found, wanted in zip(kept, expected, strict=True):
        assert torch.equal(found.cpu(), wanted)
