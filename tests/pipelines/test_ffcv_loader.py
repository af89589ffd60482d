"""FFCV's loader: PIL's pixels and everybody's views, whoever makes them."""

import dataclasses
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from pcl_fast.beton import JPG, RAW, open_beton
from pcl_fast.errors import ConfigError, DataError
from pipelines.boxes import CropRule, draw_boxes
from pipelines.ffcv_work import Decoded, ViewsOnTheDevice
from pipelines.resample import reference_views
from pipelines.torch_loader import TorchEvalLoader, TorchTrainLoader
from pipelines.view_spec import ViewSpec
from tests.datasets_prep.pictures import ImageOptions, convert_folder
from tests.pipelines.batches import assert_equal, by_sample
from tests.pipelines.ffcv_photos import (
    EVAL,
    IMAGES,
    LEVEL,
    NORMALISATION,
    SIZE,
    TRAIN,
    VIEWS,
    FfcvEvalLoader,
    FfcvTrainLoader,
    batches_of,
    convert_photos,
    opened,
    opened_to_evaluate,
)


@pytest.fixture(scope="module")
def beton(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert_photos(tmp_path_factory.mktemp("photos"))


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
