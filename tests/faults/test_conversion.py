"""Conversions that are killed, run out of disk, or lose a worker: they end soon, say why, and can go on."""

import signal
import time
from pathlib import Path

import pytest

from pcl_fast.manifest import manifest_path, open_with_manifest
from tests.datasets_prep.pictures import command, encoded, names, picture, write_folder
from tests.tiny import files_limited_to

# Found by Python in every process of the command: the decoder of one image does not come back.
CUSTOMIZE = """
import os
import PIL.Image

load = PIL.Image.open

def open(file, *arguments, **options):
    image = load(file, *arguments, **options)
    if image.size == (77, 55):
        {action}
    return image

PIL.Image.open = open
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 photos, a second of work for one core."""
    return write_folder(tmp_path_factory.mktemp("source") / "photos", 100, 4, width=900, height=700)


FLAGS = ("--max-side", "300", "--workers", "1")


@pytest.fixture(scope="module")
def undisturbed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("undisturbed") / "file.beton"
    done = command("convert", "imagefolder", source, path, *FLAGS)
    _, err = done.communicate(timeout=50)
    assert done.returncode == 0, err
    return path


def assert_same(path: Path, expected: Path) -> None:
    assert path.read_bytes() == expected.read_bytes()
    assert manifest_path(path).read_text() == manifest_path(expected).read_text()
    assert names(path.parent) == [path.name, manifest_path(path).name]


def wait_for(path: Path, part: float, whole: Path) -> None:
    """Until some images are done for good, and a part of the data is written; as `whole` will be."""
    folder = path.with_name(path.name + ".converting")
    start, end = 1 << 23, whole.stat().st_size
    deadline = time.monotonic() + 40
    while not (
        (folder / "journal").exists()
        and (folder / "journal").stat().st_size
        and (folder / "data").stat().st_size > start + part * (end - start)
    ):
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_killed_half_way_and_started_again(
    source: Path, undisturbed: Path, tmp_path: Path, number: signal.Signals
) -> None:
    path = tmp_path / "file.beton"
    words = ("convert", "imagefolder", source, path, *FLAGS)
    first = command(*words)
    wait_for(path, 0.5, undisturbed)
    first.send_signal(number)
    out, err = first.communicate(timeout=10)
    assert names(tmp_path) == ["file.beton.converting"], err
    if number == signal.SIGKILL:
        assert first.returncode == -number
    else:
        assert first.returncode == 75, err
        assert f"stopped by {number.name}" in err
    assert out == ""
    again = command(*words)
    _, err = again.communicate(timeout=50)
    assert again.returncode == 0, err
    assert "going on after the first" in err
    assert_same(path, undisturbed)


def test_a_full_disk_is_told_and_what_is_done_is_kept(
    source: Path, undisturbed: Path, tmp_path: Path
) -> None:
    path = tmp_path / "file.beton"
    words = ("convert", "imagefolder", source, path, *FLAGS)
    room = undisturbed.stat().st_size - 100_000
    with files_limited_to(room):
        first = command(*words)
    out, err = first.communicate(timeout=50)
    assert first.returncode == 1, err
    assert out == ""
    last = err.splitlines()[-1]
    assert "cannot be written: File too large" in last
    assert "make room and run the same command to go on" in last
    assert "Traceback" not in err
    assert names(tmp_path) == ["file.beton.converting"]
    again = command(*words)
    _, err = again.communicate(timeout=50)
    assert again.returncode == 0, err
    assert "going on after the first" in err
    assert_same(path, undisturbed)


def test_a_disk_that_is_full_at_the_very_end(source: Path, undisturbed: Path, tmp_path: Path) -> None:
    """Every image fits, the table after them does not."""
    path = tmp_path / "file.beton"
    words = ("convert", "imagefolder", source, path, *FLAGS)
    with files_limited_to(undisturbed.stat().st_size - 10):
        first = command(*words)
    _, err = first.communicate(timeout=50)
    assert first.returncode == 1, err
    assert "every image is converted and kept" in err.splitlines()[-1]
    assert names(tmp_path) == ["file.beton.converting"]
    again = command(*words)
    _, err = again.communicate(timeout=50)
    assert again.returncode == 0, err
    assert_same(path, undisturbed)


@pytest.fixture
def few(tmp_path: Path) -> Path:
    """40 images, one of which is of a size of its own: 77 x 55."""
    source = write_folder(tmp_path / "source", 39, 3)
    (source / "c1" / "marked.jpg").write_bytes(encoded(picture(1, 77, 55)))
    return source


def customized(tmp_path: Path, action: str) -> Path:
    folder = tmp_path / "customize"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(CUSTOMIZE.format(action=action))
    return folder


@pytest.mark.parametrize(
    ("action", "cause"),
    [("os._exit(3)", "ended with exit code 3"), ("os.kill(os.getpid(), 9)", "was killed by SIGKILL")],
)
def test_a_worker_that_dies_is_an_error_at_once(few: Path, tmp_path: Path, action: str, cause: str) -> None:
    path, folder = tmp_path / "to" / "file.beton", customized(tmp_path, "")
    text = CUSTOMIZE.format(action=f"if 'conversion.worker' in ' '.join(sys.orig_argv): {action}")
    (folder / "sitecustomize.py").write_text("import sys\n" + text)
    started = time.monotonic()
    process = command("convert", "imagefolder", few, path, "--workers", "2", path=folder)
    _, err = process.communicate(timeout=40)
    assert process.returncode == 1, err
    assert f"a conversion worker {cause} while it was at c1/marked.jpg" in err.splitlines()[-1]
    assert "Traceback" not in err
    assert time.monotonic() - started < 10
    assert names(path.parent) == ["file.beton.converting"]

    again = command("convert", "imagefolder", few, path, "--workers", "2")
    _, err = again.communicate(timeout=40)
    assert again.returncode == 0, err
    beton, manifest = open_with_manifest(path)
    assert manifest is not None
    assert beton.num_samples == 40
    beton.close()


def test_a_worker_that_hangs_is_named(few: Path, tmp_path: Path) -> None:
    path, folder = tmp_path / "to" / "file.beton", customized(tmp_path, "")
    text = CUSTOMIZE.format(action="while 'conversion.worker' in ' '.join(sys.orig_argv): time.sleep(1)")
    (folder / "sitecustomize.py").write_text("import sys, time\n" + text)
    words = ("convert", "imagefolder", few, path, "--workers", "2", "--image-timeout", "2")
    process = command(*words, path=folder)
    _, err = process.communicate(timeout=40)
    assert process.returncode == 3, err
    assert "c1/marked.jpg: took longer than 2 seconds to decode" in err
    assert "1 of 40 images cannot be used" in err.splitlines()[-1]
    again = command(*words)
    _, err = again.communicate(timeout=40)
    assert again.returncode == 0, "it is tried again: this time it does not hang\n" + err
    assert names(path.parent) == ["file.beton", "file.beton.manifest.json"]


def test_workers_end_when_their_director_is_killed(source: Path, undisturbed: Path, tmp_path: Path) -> None:
    path = tmp_path / "file.beton"
    process = command("convert", "imagefolder", source, path, "--workers", "2")
    wait_for(path, 0.0, undisturbed)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) == 2
    process.kill()
    process.communicate(timeout=10)
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.05)
