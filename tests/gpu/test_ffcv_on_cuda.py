"""FFCV's loader on a CUDA device: bytes are sent once an image, and the views are the CPU's."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.pipelines.ffcv_photos import (
    EVAL,
    TRAIN,
    FfcvEvalLoader,
    FfcvTrainLoader,
    batches_of,
    convert_photos,
)

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_views_are_those_of_the_cpu(tmp_path: Path, dtype: torch.dtype) -> None:
    path = convert_photos(tmp_path)
    options = dataclasses.replace(TRAIN, device=torch.device("cuda"), dtype=dtype)
    loader = FfcvTrainLoader(path, options)
    tolerances: dict[str, Any] = {"rtol": 0 if dtype == torch.float32 else 2**-7, "atol": 1e-4}
    for epoch in range(3):
        kept = list(loader.epoch(epoch))
        for ours, cpu in zip(kept, batches_of(path, epoch, dtype=dtype), strict=True):
            assert ours.views_VBCHW.is_cuda
            torch.testing.assert_close(ours.views_VBCHW.cpu(), cpu.views_VBCHW, **tolerances)
            assert torch.equal(ours.labels_B.cpu(), cpu.labels_B)
            assert torch.equal(ours.sample_ids_B.cpu(), cpu.sample_ids_B)
            assert ours.views_VBCHW.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)


def test_evaluation_is_that_of_the_cpu(tmp_path: Path) -> None:
    path = convert_photos(tmp_path)
    ours = FfcvEvalLoader(path, dataclasses.replace(EVAL, device=torch.device("cuda")))
    for batch, cpu in zip(ours, FfcvEvalLoader(path, EVAL), strict=True):
        torch.testing.assert_close(batch.images_BCHW.cpu(), cpu.images_BCHW, rtol=0, atol=1e-4)
        assert torch.equal(batch.labels_B.cpu(), cpu.labels_B)
