"""Files that are cut, or rot: refused, named by `verify`, and never served as other pixels."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from datasets_prep.verify import verify
from pcl_fast.beton import SAMPLES_AT, open_beton
from pcl_fast.errors import DataError
from pcl_fast.manifest import manifest_path, open_with_manifest
from tests.datasets_prep.pictures import command, convert_folder, stopping_at, write_folder

NEVER = 1 << 60


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 photos in three pages of 2 MB."""
    folder = tmp_path_factory.mktemp("made")
    source = write_folder(folder / "source", 24, 3, width=900, height=900)
    convert_folder(source, folder / "file.beton", page_size=1 << 21)
    return folder / "file.beton"


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    path = tmp_path / "file.beton"
    shutil.copy(made, path)
    shutil.copy(manifest_path(made), manifest_path(path))
    return path


def cuts(size: int, num_samples: int, last: int) -> dict[str, int]:
    """Twelve places to cut a file at: what is left, in bytes."""
    table = 24 * num_samples
    return {
        "to nothing": 0,
        "in the header": 10,
        "after the header": 24,
        "in the fields": 1500,
        "in the samples": SAMPLES_AT + 24 * 3 + 7,
        "after the samples": SAMPLES_AT + 24 * num_samples,
        "at the first page": 1 << 21,
        "in the middle": size // 2,
        "in the last image": last,
        "before the table": size - table,
        "by two samples of the table": size - 48,
        "by one byte": size - 1,
    }


@pytest.mark.parametrize("where", cuts(0, 0, 0))
def test_a_cut_file_is_refused(copy: Path, where: str) -> None:
    with open_beton(copy) as beton:
        last = int(beton.offsets_N[-1]) + 10
        size = cuts(beton.file_size, beton.num_samples, last)[where]
    with copy.open("r+b") as file:
        file.truncate(size)
    for use in (open_beton, open_with_manifest):
        with pytest.raises(DataError, match=r"file\.beton cannot be used: it (is cut|has \d+ bytes)"):
            use(copy)


def test_the_command_refuses_a_cut_file_in_one_line(copy: Path) -> None:
    with copy.open("r+b") as file:
        file.truncate(copy.stat().st_size - 48)
    process = command("verify", copy)
    out, err = process.communicate(timeout=40)
    assert process.returncode == 3
    assert out == ""
    assert err.count("\n") == 1
    assert "it is cut" in err


def test_verify_names_every_flipped_byte(copy: Path) -> None:
    draws = np.random.default_rng(0)
    with open_beton(copy) as beton:
        chosen = sorted(draws.choice(beton.num_samples, 9, replace=False).tolist())
        with copy.open("r+b") as file:
            for sample in chosen:
                place = int(beton.offsets_N[sample]) + int(draws.integers(beton.lengths_N[sample]))
                file.seek(place)
                before = file.read(1)[0]
                file.seek(place)
                file.write(bytes([before ^ 1 << int(draws.integers(8))]))
    found = verify(copy, 2, stopping_at(NEVER))
    assert [int(line.split()[1]) for line in found.problems] == chosen
    assert all("its checksum is wrong" in line for line in found.problems)
    assert found.problems[0].startswith(f"sample {chosen[0]} (c")

    beton, manifest = open_with_manifest(copy)
    assert manifest is not None
    for sample in range(beton.num_samples):
        if sample in chosen:
            with pytest.raises(DataError, match=f"sample {sample} is damaged"):
                manifest.check(beton, sample)
        else:
            manifest.check(beton, sample)
    beton.close()

    process = command("verify", copy)
    out, err = process.communicate(timeout=40)
    assert process.returncode == 3
    assert [int(line.split()[1]) for line in out.splitlines()] == chosen
    assert "has 9 problems, listed above" in err.splitlines()[-1]


def test_any_flipped_byte_of_labels_or_index_is_noticed_on_opening(copy: Path) -> None:
    """Bytes 0 to the end of the samples, and the table: the gaps between pages hold nothing."""
    with open_beton(copy) as beton:
        size, samples_end = beton.file_size, SAMPLES_AT + 24 * beton.num_samples
    places = [*range(SAMPLES_AT, samples_end, 5), *range(size - 24 * 24, size, 7), *range(0, SAMPLES_AT, 97)]
    for place in places:
        with copy.open("r+b") as file:
            file.seek(place)
            before = file.read(1)
            file.seek(place)
            file.write(bytes([before[0] ^ 0x10]))
            file.flush()
            with pytest.raises(DataError, match=r"file\.beton (cannot be used|is not the file)"):
                open_with_manifest(copy)
            file.seek(place)
            file.write(before)
    open_with_manifest(copy)[0].close()


def test_without_a_manifest_verify_still_decodes_everything(copy: Path) -> None:
    manifest_path(copy).unlink()
    with open_beton(copy) as beton, copy.open("r+b") as file:
        file.seek(int(beton.offsets_N[3]))
        file.write(b"\xff\xd9")
        file.seek(int(beton.offsets_N[20]) + int(beton.lengths_N[20]) // 2)
        file.write(b"\xff\xd9")
    found = verify(copy, 1, stopping_at(NEVER))
    assert not found.has_manifest
    assert found.problems == (
        "sample 3: it is not a JPEG",
        "sample 20: it cannot be decoded: cut: its compressed data end before the image does",
    )
