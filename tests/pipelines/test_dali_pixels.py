"""DALI's pixels are PIL's, and the views are the oracle's of them."""

import contextlib
import dataclasses
import io
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from datasets_prep.conversion.codec import ImageOptions
from pcl_fast.contract import EvalLoader, ViewBatch
from pipelines.boxes import centre_boxes, draw_boxes
from pipelines.dali_feed import plain_jpeg_size
from pipelines.dali_loader import DaliEvalLoader
from pipelines.images import decode, open_images
from pipelines.resample import reference_views, resample
from pipelines.view_spec import ViewSpec
from tests.datasets_prep.pictures import convert_folder, encoded, picture
from tests.pipelines.batches import by_sample
from tests.pipelines.dali_photos import (
    EVAL,
    IMAGES,
    LEVEL,
    MEAN,
    NORMALISATION,
    SIZE,
    STD,
    VIEWS,
    batches_of,
    odd_kinds,
    write_photos,
)

pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed: pip install 'pcl-fast[dali]'")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos"))


def check_views(path: Path, batches: list[ViewBatch], labels: list[int], size: int) -> None:
    """Every view is the oracle's of PIL's pixels."""
    views, source = by_sample(batches), open_images(path)
    spec = ViewSpec(normalisation=NORMALISATION, size=size)
    assert views.keys() == set(range(len(labels)))
    for sample, (views_VCHW, label) in views.items():
        assert label == labels[sample]
        image_HWC = torch.from_numpy(np.array(decode(source, sample)))
        boxes = draw_boxes(torch.tensor([image_HWC.shape[:2]]), torch.tensor([sample]), VIEWS, 7, 1)
        expected_VBCHW = reference_views(image_HWC.unsqueeze(0), boxes, spec)
        assert (views_VCHW - expected_VBCHW[:, 0]).abs().max() <= 1e-3 * LEVEL, sample


def test_views_are_the_oracles_of_pils_pixels(folder: Path) -> None:
    check_views(folder, batches_of(folder), [label for _, label in ImageFolder(str(folder)).samples], SIZE)


@pytest.mark.parametrize("mode", ["jpg", "raw"])
def test_views_of_a_beton_are_the_oracles_of_its_pixels(folder: Path, tmp_path: Path, mode: str) -> None:
    path = tmp_path / "photos.beton"
    convert_folder(folder, path, image=ImageOptions(mode=mode))  # type: ignore[arg-type]
    check_views(path, batches_of(path), [label for _, label in ImageFolder(str(folder)).samples], SIZE)


def test_odd_images_of_the_wild_are_pils(shared_data: Path, tmp_path: Path) -> None:
    """Those that PIL decodes, and that are not too large for a test."""
    (tmp_path / "odd").mkdir()
    for number, path in enumerate(sorted((shared_data / "odd-images").rglob("*.jp*g"))):
        data = path.read_bytes()
        with contextlib.suppress(Exception), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if len(data) < 500_000 and Image.open(io.BytesIO(data)).convert("RGB"):
                (tmp_path / "odd" / f"{number}.jpg").write_bytes(data)
    count = len(open_images(tmp_path).labels_N)
    assert count > 60
    check_views(tmp_path, batches_of(tmp_path, batch_size=16), [0] * count, SIZE)


def test_what_goes_to_dali_undecoded() -> None:
    plain = {
        "gray.jpg",
        "progressive.jpg",
        "turned.jpg",
        "followed.jpg",
        "restarts.jpg",
        "fine.jpg",
        "tiny.jpg",
    }
    found = {name: plain_jpeg_size(data) for name, data in odd_kinds().items()}
    assert {name for name, size in found.items() if size is not None} == plain
    assert found["fine.jpg"] == (48, 64)
    for data in (b"", b"\xff", b"\xff\xd8", b"\xff\xd8\xff", encoded(picture())[:100]):
        assert plain_jpeg_size(data) is None


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
    for crops in ("ours", "library"):
        loader: EvalLoader = DaliEvalLoader(folder, dataclasses.replace(EVAL, crops=crops))
        batches = list(loader)
        assert [len(batch.labels_B) for batch in batches] == [6, 6, 6, 6, 3]
        assert loader.num_samples == IMAGES
        images = torch.cat([batch.images_BCHW for batch in batches])
        assert torch.cat([batch.labels_B for batch in batches]).tolist() == [label for _, label in files]
        for sample, image in enumerate(images):
            assert (image - files[sample][0]).abs().max() <= 1.01 * LEVEL, (crops, files.samples[sample])


@pytest.mark.parametrize("size", [12, 64])
def test_crops_by_dali_differ_at_the_rim_alone(folder: Path, size: int) -> None:
    """Of views smaller than their box, where its filter repeats the pixels of the rim."""
    ours, dalis = (batches_of(folder, image_size=size, crops=crops) for crops in ("ours", "library"))
    for one, other in zip(ours, dalis, strict=True):
        assert torch.equal(one.sample_ids_B, other.sample_ids_B)
        levels = (one.views_VBCHW - other.views_VBCHW).abs() * STD * 255
        assert levels[..., 1:-1, 1:-1].max() <= 0.02
        assert levels.max() <= 40


@pytest.mark.parametrize("most_padded", [1 << 32, 6 * 3 * 64 * 90 - 1], ids=["padded", "one by one"])
def test_views_made_of_a_whole_batch_are_the_same_to_rounding(
    folder: Path, monkeypatch: pytest.MonkeyPatch, most_padded: int
) -> None:
    """As on a device: without a compiler they are made so here, too."""
    whole, centres = batches_of(folder), list(DaliEvalLoader(folder, EVAL))
    monkeypatch.setattr("pipelines.views_cpu.why_unavailable", lambda: "no C++ compiler")
    monkeypatch.setattr("pipelines.dali_pipeline.MOST_PADDED", most_padded)
    for one, other in zip(batches_of(folder), whole, strict=True):
        assert (one.views_VBCHW - other.views_VBCHW).abs().max() <= 1e-3 * LEVEL
    for one, other in zip(DaliEvalLoader(folder, EVAL), centres, strict=True):
        assert (one.images_BCHW - other.images_BCHW).abs().max() <= 1e-3 * LEVEL


def test_photos_decoded_by_dali_are_pils(shared_data: Path) -> None:
    photos = shared_data / "imagenet-mini" / "val"
    options = dataclasses.replace(EVAL, num_classes=18, image_size=64, resize=64, channels_last=False)
    source, images = (
        open_images(photos),
        torch.cat([one.images_BCHW for one in DaliEvalLoader(photos, options)]),
    )
    for sample in range(0, len(images), 9):
        pixels = torch.from_numpy(np.array(decode(source, sample)))
        boxes = centre_boxes(torch.tensor([pixels.shape[:2]]), 64, 64)
        expected = resample(pixels.unsqueeze(0), boxes, 64, torch.float64)[0, 0]
        levels = (images[sample].double() * STD + MEAN) * 255 - expected
        assert levels.abs().max() < 0.001


def picture_of_jpeg(seed: int) -> bytes:
    return Image.open(io.BytesIO(encoded(picture(seed)))).convert("RGB").tobytes()


def test_pictures_of_this_file_are_what_they_are_called() -> None:
    kinds = {name: Image.open(io.BytesIO(data)) for name, data in odd_kinds().items()}
    assert kinds["cmyk.jpg"].mode == "CMYK"
    assert kinds["gray.jpg"].mode == "L"
    assert kinds["png.jpg"].format == "PNG"
    assert kinds["palette.png"].mode == "P"
    assert kinds["turned.jpg"].getexif()[0x0112] == 6
    assert kinds["progressive.jpg"].info["progressive"]
    assert kinds["stray.jpg"].convert("RGB").tobytes() == picture_of_jpeg(97)
