"""Verification of whole files, and the contact sheet. What it finds in damaged ones: tests/faults."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datasets_prep.contact_sheet import CAPTION, GAP, TILE, contact_sheet
from datasets_prep.conversion.codec import ImageOptions
from datasets_prep.verify import verify
from pcl_fast.beton import SAMPLE, SAMPLES_AT, open_beton
from pcl_fast.manifest import manifest_path, read_manifest
from tests.datasets_prep.pictures import convert_folder, decoded, stopping_at, write_folder

NEVER = 1 << 60


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """150 photos in three classes: more than two chunks of a thread."""
    convert_folder(write_folder(tmp_path / "source", 150, 3), tmp_path / "file.beton")
    return tmp_path / "file.beton"


@pytest.mark.parametrize("workers", [1, 3])
def test_nothing_is_wrong_with_a_whole_file(made: Path, workers: int) -> None:
    found = verify(made, workers, stopping_at(NEVER))
    assert found.problems == ()
    assert (found.num_samples, found.num_classes, found.has_manifest) == (150, 3, True)


def test_pixels_are_verified_too(tmp_path: Path) -> None:
    raw = ImageOptions(mode="raw")
    convert_folder(write_folder(tmp_path / "source", 5, 2), tmp_path / "file.beton", image=raw)
    assert verify(tmp_path / "file.beton", 2, stopping_at(NEVER)).problems == ()


def test_a_changed_label_and_a_changed_size_are_named(made: Path) -> None:
    content = bytearray(made.read_bytes())
    samples = np.frombuffer(content, SAMPLE, 150, SAMPLES_AT)
    samples["label"][7], samples["width"][140] = 3, 63
    made.write_bytes(content)
    assert verify(made, 2, stopping_at(NEVER)).problems == (
        "its labels or its index are not those that file.beton.manifest.json describes",
        "sample 7: its label is 3, but there are 3 classes",
        "sample 140 (c2): it is 64 x 48, the file says 63 x 48",
    )


def test_the_manifest_of_another_file_is_one_problem(made: Path, tmp_path: Path) -> None:
    convert_folder(write_folder(tmp_path / "other", 9, 3), tmp_path / "other.beton")
    manifest_path(tmp_path / "other.beton").replace(manifest_path(made))
    problems = verify(made, 1, stopping_at(NEVER)).problems
    assert problems == ("it holds 150 samples, file.beton.manifest.json describes 9",)


def test_the_contact_sheet_shows_images_of_every_class(made: Path) -> None:
    with open_beton(made) as beton:
        sheet = contact_sheet(beton, read_manifest(made))
        first = Image.fromarray(decoded(bytes(beton.encoded(0)))).resize(
            (TILE, 120), Image.Resampling.BICUBIC
        )
    assert sheet.size == (8 * (TILE + GAP) + GAP, 8 * (TILE + CAPTION + GAP) + GAP)
    shown = np.asarray(sheet)[GAP + 20 : GAP + 140, GAP : GAP + TILE]
    np.testing.assert_array_equal(shown, np.asarray(first))
    caption = np.asarray(sheet)[GAP + TILE : GAP + TILE + CAPTION, GAP : GAP + TILE]
    assert (caption < 128).any()
