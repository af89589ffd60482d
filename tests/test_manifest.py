"""The manifest: read as written, checked against its file, and refused when it is damaged."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from pcl_fast.errors import DataError
from pcl_fast.manifest import Manifest, Quarantined, manifest_path, open_with_manifest, read_manifest
from tests.datasets_prep.pictures import convert_folder, write_folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    folder = tmp_path_factory.mktemp("made")
    source = write_folder(folder / "source")
    (source / "c1" / "bad.jpg").write_bytes(b"no image")
    return folder / "file.beton", convert_folder(source, folder / "file.beton", max_bad=1)


@pytest.fixture
def copy(made: tuple[Path, Manifest], tmp_path: Path) -> Path:
    path = tmp_path / "file.beton"
    shutil.copy(made[0], path)
    shutil.copy(manifest_path(made[0]), manifest_path(path))
    return path


def test_it_is_read_as_it_was_written(made: tuple[Path, Manifest]) -> None:
    path, written = made
    read = read_manifest(path)
    assert read is not None
    assert read.checksums_N.dtype == np.uint32
    for field in dataclasses.fields(Manifest):
        np.testing.assert_array_equal(getattr(read, field.name), getattr(written, field.name), field.name)
    assert json.loads(manifest_path(path).read_text())["classes"] == ["c0", "c1", "c2"]


def test_what_it_says(made: tuple[Path, Manifest]) -> None:
    path, manifest = made
    assert manifest.classes == ("c0", "c1", "c2")
    assert manifest.class_counts == (4, 4, 4)
    assert (manifest.num_samples, manifest.file_size) == (12, path.stat().st_size)
    assert manifest.quarantine == (Quarantined("c1/bad.jpg", "not an image in a known format"),)
    assert manifest.stored == {"original bytes": 12, "encoded anew": 0, "raw": 0, "shrunk": 0}
    assert manifest.options["max_side"] == 500
    beton, _ = open_with_manifest(path)
    for sample in range(12):
        manifest.check(beton, sample)
    beton.close()


def test_without_a_manifest_a_file_is_used_unchecked(copy: Path) -> None:
    manifest_path(copy).unlink()
    beton, manifest = open_with_manifest(copy)
    assert manifest is None
    assert beton.num_samples == 12
    beton.close()


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text[:-30],
        lambda text: "",
        lambda text: "[]",
        lambda text: text.replace('"format": 1', '"format": 2'),
        lambda text: text.replace('"classes"', '"glasses"'),
        lambda text: text.replace('"num_samples": 12', '"num_samples": 13'),
        lambda text: text.replace('"checksums_N": "', '"checksums_N": "?'),
    ],
)
def test_a_damaged_manifest_is_named(copy: Path, change: "object") -> None:
    path = manifest_path(copy)
    path.write_text(change(path.read_text()))  # type: ignore[operator]
    with pytest.raises(DataError, match=r"file\.beton\.manifest\.json is not a readable manifest"):
        read_manifest(copy)


def test_a_changed_label_is_noticed_on_opening(copy: Path) -> None:
    with copy.open("r+b") as file:
        file.seek(24 + 2 * 1041 + 5 * 24 + 16)
        file.write(b"\x02")
    with pytest.raises(DataError, match="its labels or its index have changed"):
        open_with_manifest(copy)


def test_the_manifest_of_another_file_is_noticed(copy: Path, tmp_path: Path) -> None:
    convert_folder(write_folder(tmp_path / "other", 13), tmp_path / "other.beton")
    shutil.copy(manifest_path(tmp_path / "other.beton"), manifest_path(copy))
    with pytest.raises(DataError, match="one of the two is of another conversion"):
        open_with_manifest(copy)


def test_a_changed_image_is_noticed_when_it_is_checked(copy: Path) -> None:
    beton, manifest = open_with_manifest(copy)
    assert manifest is not None
    with copy.open("r+b") as file:
        file.seek(int(beton.offsets_N[7]) + 100)
        file.write(b"\x00\x01\x02\x03")
    manifest.check(beton, 6)
    with pytest.raises(DataError, match=r"sample 7 is damaged \(its checksum is wrong\); `pcl-fast verify"):
        manifest.check(beton, 7)
    beton.close()
