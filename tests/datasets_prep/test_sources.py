"""Every form of a release in every container gives the same canonical files; damage gives DataErrors."""

import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datasets_prep.fetch import fetch_release
from pcl_fast.errors import DataError
from tests.datasets_prep.tiny import Tiny, make_tiny, tar_gz, tree, zipped

WRITE = {"binary": Tiny.write_binary, "python": Tiny.write_python, "npm": Tiny.write_npm}
FORMS = [("binary", 1), ("binary", 2), ("python", 1), ("python", 2), ("npm", 1)]


def _folder(folder: Path) -> Path:
    return folder


def _one_deeper(folder: Path) -> Path:
    (folder.parent / "another").mkdir()
    return folder.parent


def _tar_gz(folder: Path) -> Path:
    return tar_gz(folder, folder.parent / "any name.tar.gz")


def _tgz(folder: Path) -> Path:
    return tar_gz(folder, folder.parent / "any name.tgz")


def _zip(folder: Path) -> Path:
    return zipped(folder, folder.parent / "any name.zip")


def _folder_of_archives(folder: Path) -> Path:
    downloads = folder.parent / "downloads"
    downloads.mkdir()
    (downloads / "other.tar.gz").write_bytes(b"not to be looked at")
    tar_gz(folder, downloads / "tiny-sheets-1.0.0.tgz")
    return downloads


def fetch_quietly(tiny: Tiny, source: Path, data_dir: Path) -> Path:
    return fetch_release(tiny.release, source, data_dir, report=lambda line: None)


def refused(tiny: Tiny, source: Path, data_dir: Path) -> str:
    """The message of the DataError; nothing may be left behind."""
    with pytest.raises(DataError) as caught:
        fetch_quietly(tiny, source, data_dir)
    assert tree(data_dir) == []
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("container", [_folder, _one_deeper, _tar_gz, _tgz, _zip, _folder_of_archives])
@pytest.mark.parametrize(("form", "fields"), FORMS)
def test_every_form_in_every_container(
    form: str, fields: int, container: Callable[[Path], Path], tmp_path: Path
):
    if fields == 2 and container is _folder_of_archives:
        container = _tar_gz  # a set without a package has no archive of that name
    tiny = make_tiny(fields=fields)
    folder = tmp_path / "source" / "release"
    WRITE[form](tiny, folder)
    got = fetch_quietly(tiny, container(folder), tmp_path / "cache")
    assert got == tmp_path / "cache" / "tiny-bin"
    assert {path.name: path.read_bytes() for path in got.iterdir()} == {
        f"{name}.bin": tiny.canonical(name) for name in tiny.images
    }


@pytest.mark.parametrize(("form", "fields"), FORMS)
def test_another_data_set_of_the_same_shape_is_refused(form: str, fields: int, tmp_path: Path):
    WRITE[form](make_tiny(seed=1, fields=fields), tmp_path / "release")
    tiny = make_tiny(seed=0, fields=fields)
    message = refused(tiny, tmp_path / "release", tmp_path / "cache")
    assert f"data_batch_1.bin from {tmp_path / 'release'} has the SHA-1" in message
    assert f"not {tiny.release.train[0].sha1}" in message


@pytest.mark.parametrize(
    ("form", "file", "cut", "expected"),
    [
        ("binary", "test_batch.bin", 1, "test_batch.bin has 15364 bytes, not 15365"),
        ("python", "data_batch_2", 1, "data_batch_2 is cut or not a pickle"),
        ("npm", "data_batch_3.png", 1000, "data_batch_3.png is cut or damaged"),
        ("npm", "train_lables.json", 1, "train_lables.json is cut or not JSON"),
    ],
)
@pytest.mark.parametrize("container", [_folder, _tar_gz])
def test_cut_file(
    form: str, file: str, cut: int, expected: str, container: Callable[[Path], Path], tmp_path: Path
):
    tiny = make_tiny()
    folder = tmp_path / "release"
    WRITE[form](tiny, folder)
    (folder / file).write_bytes((folder / file).read_bytes()[:-cut])
    source = container(folder)
    message = refused(tiny, source, tmp_path / "cache")
    assert message.startswith(f"tiny: in {source}, {expected}")


def test_flipped_bit_in_the_last_file(tmp_path: Path):
    tiny = make_tiny()
    tiny.write_binary(tmp_path / "release")
    path = tmp_path / "release" / "test_batch.bin"
    data = bytearray(path.read_bytes())
    data[-1] ^= 0x80
    path.write_bytes(data)
    assert "test_batch.bin" in refused(tiny, tmp_path / "release", tmp_path / "cache")


def test_missing_files_are_named(tmp_path: Path):
    tiny = make_tiny()
    tiny.write_npm(tmp_path / "release")
    (tmp_path / "release" / "data_batch_2.png").unlink()
    (tmp_path / "release" / "test_lables.json").unlink()
    message = refused(tiny, tmp_path, tmp_path / "cache")
    assert "holds part of the npm package, without data_batch_2.png, test_lables.json" in message


def test_nothing_there(tmp_path: Path):
    tiny = make_tiny(fields=2)
    (tmp_path / "empty").mkdir()
    message = refused(tiny, tmp_path / "empty", tmp_path / "cache")
    assert f"{tmp_path / 'empty'} does not hold it; looked for data_batch_1.bin .. test_batch.bin" in message
    assert "npm" not in message
    assert "absent does not exist" in refused(tiny, tmp_path / "absent", tmp_path / "cache")


@pytest.mark.parametrize("pack", [_tar_gz, _zip])
@pytest.mark.parametrize("keep", [0.0, 0.3, 0.97])
def test_cut_archive(pack: Callable[[Path], Path], keep: float, tmp_path: Path):
    tiny = make_tiny()
    tiny.write_binary(tmp_path / "release")
    archive = pack(tmp_path / "release")
    data = archive.read_bytes()
    archive.write_bytes(data[: int(keep * len(data))])
    assert str(archive) in refused(tiny, archive, tmp_path / "cache")


@pytest.mark.parametrize("pack", [_tar_gz, _zip])
def test_archive_with_a_flipped_bit(pack: Callable[[Path], Path], tmp_path: Path):
    tiny = make_tiny()
    tiny.write_binary(tmp_path / "release")
    archive = pack(tmp_path / "release")
    data = bytearray(archive.read_bytes())
    data[len(data) // 2] ^= 0x10
    archive.write_bytes(data)
    assert str(archive) in refused(tiny, archive, tmp_path / "cache")


def test_archive_cannot_write_elsewhere(tmp_path: Path):
    tiny = make_tiny()
    tiny.write_binary(tmp_path / "release")
    archive = tmp_path / "evil.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for path in (tmp_path / "release").iterdir():
            tar.add(path, f"../../../{path.name}")
        link = tarfile.TarInfo("release/data_batch_1.bin")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    before = tree(tmp_path)
    got = fetch_quietly(tiny, archive, tmp_path / "cache")
    assert (got / "data_batch_1.bin").read_bytes() == tiny.canonical("data_batch_1")
    assert [name for name in tree(tmp_path) if not name.startswith("cache")] == before


def test_malicious_release_is_refused(tmp_path: Path):
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "called"),)

    tiny = make_tiny()
    tiny.write_python(tmp_path / "release")
    (tmp_path / "release" / "data_batch_1").write_bytes(pickle.dumps({"data": Evil(), "labels": []}))
    assert "refused a pickle that names posix.mkdir" in refused(
        tiny, tmp_path / "release", tmp_path / "cache"
    )
    assert not (tmp_path / "called").exists()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"labels": [1, 2]}, "holds 2 labels and pixels of shape (3, 3072), not 3 of each"),
        ({"labels": [1, 2, 100]}, "not a list of integers within 0..99"),
        ({"labels": [1, 2, -1]}, "not a list of integers within 0..99"),
        ({"labels": ["a", "b", "c"]}, "not a list of integers within 0..99"),
        ({"data": np.zeros((3, 3072), np.int32)}, "'data' is not an array of uint8"),
        ({"data": np.zeros((3, 3071), np.uint8)}, "pixels of shape (3, 3071)"),
        ({"data": [0] * 9216}, "'data' is not an array of uint8"),
        ({"fine_labels": None}, "has no 'fine_labels'"),
    ],
)
def test_pickles_of_something_else(change: dict[str, object], expected: str, tmp_path: Path):
    tiny = make_tiny()
    tiny.write_python(tmp_path / "release")
    content: dict[str, object] = {"data": np.zeros((3, 3072), np.uint8)}
    for key, value in change.items():
        content["fine_labels" if key == "labels" else key] = value
    if content.get("fine_labels", ()) is None:
        del content["fine_labels"]
    elif "fine_labels" not in content:
        content["fine_labels"] = [1, 2, 3]
    (tmp_path / "release" / "data_batch_1").write_bytes(pickle.dumps(content))
    assert expected in refused(tiny, tmp_path / "release", tmp_path / "cache")


@pytest.mark.parametrize(("mode", "size"), [("RGBA", (1024, 3)), ("RGB", (1024, 4)), ("RGB", (512, 3))])
def test_sheets_of_another_shape(mode: str, size: tuple[int, int], tmp_path: Path):
    tiny = make_tiny()
    tiny.write_npm(tmp_path / "release")
    Image.new(mode, size).save(tmp_path / "release" / "data_batch_1.png")
    message = refused(tiny, tmp_path / "release", tmp_path / "cache")
    assert f"data_batch_1.png is {mode} of {size[0]} x {size[1]} pixels, not RGB of 1024 x 3" in message
