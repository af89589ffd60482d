"""Conversions: the same bytes however they come about, nothing under the final name before its time."""

import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from datasets_prep.conversion.codec import ImageOptions
from datasets_prep.conversion.state import ConversionState
from datasets_prep.convert import ConvertOptions
from datasets_prep.listings.listing import list_folder
from pcl_fast.beton import open_beton
from pcl_fast.errors import ConfigError, DataError, PclError
from pcl_fast.manifest import manifest_path, open_with_manifest
from tests.datasets_prep.pictures import Stopped, convert_folder, encoded, names, picture, write_folder

LARGE = {"width": 400, "height": 300}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """70 photos, some of which have to be shrunk."""
    folder = write_folder(tmp_path_factory.mktemp("source") / "photos", 60, 5)
    for number in range(10):
        (folder / "c2" / f"large{number}.jpg").write_bytes(encoded(picture(number, **LARGE)))
    return folder


SMALLER = ImageOptions(max_side=200)


@pytest.fixture(scope="module")
def undisturbed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("undisturbed") / "file.beton"
    convert_folder(source, path, image=SMALLER)
    return path


def assert_same(path: Path, expected: Path) -> None:
    """The same file, the same manifest, and nothing else in the folder."""
    assert path.read_bytes() == expected.read_bytes()
    assert manifest_path(path).read_text() == manifest_path(expected).read_text()
    assert names(path.parent) == [path.name, manifest_path(path).name]


def fresh(tmp_path: Path) -> Path:
    (tmp_path / "to").mkdir()
    return tmp_path / "to" / "file.beton"


@pytest.mark.parametrize("workers", [2, 3])
def test_the_bytes_do_not_depend_on_the_workers(
    source: Path, undisturbed: Path, tmp_path: Path, workers: int
) -> None:
    path = fresh(tmp_path)
    convert_folder(source, path, image=SMALLER, workers=workers)
    assert_same(path, undisturbed)


def test_pages_are_filled_in_order_and_never_crossed(tmp_path: Path) -> None:
    options = ImageOptions(mode="raw", max_side=0)
    source = write_folder(tmp_path / "source", 10, 2, width=800, height=600)
    convert_folder(source, tmp_path / "file.beton", image=options, page_size=1 << 21, workers=2)
    with open_beton(tmp_path / "file.beton") as beton:
        assert beton.page_of_N.tolist() == [1 + i for i in range(10)], "one image of 1.4 MB a page of 2 MB"


@pytest.mark.parametrize("images", [1, 7])
def test_few_images(tmp_path: Path, images: int) -> None:
    convert_folder(write_folder(tmp_path / "source", images, 1), tmp_path / "file.beton", workers=4)
    beton, manifest = open_with_manifest(tmp_path / "file.beton")
    assert manifest is not None
    assert beton.num_samples == images
    for sample in range(images):
        manifest.check(beton, sample)
    beton.close()


@pytest.mark.parametrize("images", [0, 1, 40, 69])
def test_a_stopped_conversion_goes_on(source: Path, undisturbed: Path, tmp_path: Path, images: int) -> None:
    path, said = fresh(tmp_path), list[str]()
    with pytest.raises(Stopped):
        convert_folder(source, path, image=SMALLER, stop_at=images)
    assert names(path.parent) == ["file.beton.converting"]
    if images == 40:  # torn by the crash of the machine
        with (path.with_name("file.beton.converting") / "journal").open("ab") as file:
            file.write(b"PCLj half a block")
    convert_folder(source, path, said, image=SMALLER, workers=2)
    assert_same(path, undisturbed)
    going_on = [int(line.split()[5]) for line in said if line.startswith("going on after the first")]
    assert going_on == [] if not images else images <= going_on[0] <= 70


@pytest.mark.parametrize("ending", ["file.beton.manifest.json", "file.beton"])
def test_stopped_at_the_very_end_it_goes_on(
    source: Path, undisturbed: Path, tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the manifest, or between it and the file, gets its name."""
    path, replace = fresh(tmp_path), os.replace

    def stop(old: Path, new: Path) -> None:
        if Path(new).name == ending:
            raise Stopped
        replace(old, new)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", stop)
        with pytest.raises(Stopped):
            convert_folder(source, path, image=SMALLER)
    assert not path.exists()
    convert_folder(source, path, image=SMALLER)
    assert_same(path, undisturbed)


def test_what_was_lost_of_the_data_is_written_again(source: Path, undisturbed: Path, tmp_path: Path) -> None:
    path = fresh(tmp_path)
    with pytest.raises(Stopped):
        convert_folder(source, path, image=SMALLER, stop_at=40)
    os.truncate(path.with_name("file.beton.converting") / "data", 1000)
    convert_folder(source, path, image=SMALLER)
    assert_same(path, undisturbed)


def test_other_options_start_anew_and_say_so(source: Path, undisturbed: Path, tmp_path: Path) -> None:
    path, said = fresh(tmp_path), list[str]()
    for image in (SMALLER, ImageOptions(max_side=100, quality=50)):
        with pytest.raises(Stopped):
            convert_folder(source, path, said, image=image, stop_at=40)
    assert any("with other options: starting anew" in line for line in said)
    convert_folder(source, path, image=SMALLER)
    assert_same(path, undisturbed)


def test_what_changed_in_the_source_meanwhile_is_converted_anew(source: Path, tmp_path: Path) -> None:
    copy, path, said = tmp_path / "copy", fresh(tmp_path), list[str]()
    shutil.copytree(source, copy)
    with pytest.raises(Stopped):
        convert_folder(copy, path, image=SMALLER, stop_at=40)
    (copy / "c0" / "0020.jpg").write_bytes(encoded(picture(999, 70, 50)))
    convert_folder(copy, path, said, image=SMALLER)
    assert "going on after the first 4 of 70 images" in said, "c0/0020.jpg is the fifth"
    convert_folder(copy, tmp_path / "expected" / "file.beton", image=SMALLER)
    assert_same(path, tmp_path / "expected" / "file.beton")


def test_bad_images_are_all_listed_at_the_end(source: Path, tmp_path: Path) -> None:
    copy, path = tmp_path / "copy", fresh(tmp_path)
    shutil.copytree(source, copy)
    good = encoded(picture(1, 160, 120))
    (copy / "c0" / "a.jpg").write_bytes(b"")
    (copy / "c1" / "b.jpg").write_bytes(good[: len(good) // 2])
    (copy / "c4" / "z.jpg").write_bytes(b"GIF, or so it says")
    said: list[str] = []
    with pytest.raises(
        DataError, match=r"3 of 73 images cannot be used \(--max-bad is 2\).*--max-bad 3"
    ) as error:
        convert_folder(copy, path, said, image=SMALLER, max_bad=2, workers=2)
    assert "\n" not in str(error.value)
    expected = [
        ("c0/a.jpg", "the file is empty"),
        ("c1/b.jpg", "image file is truncated"),
        ("c4/z.jpg", "not an image in a known format"),
    ]
    listed = [
        line.split("\t") for line in (tmp_path / "to/file.beton.quarantine.txt").read_text().splitlines()
    ]
    assert [name for name, _ in listed] == [name for name, _ in expected]
    assert (listed[0][1], listed[2][1]) == (expected[0][1], expected[2][1])
    assert listed[1][1].startswith(expected[1][1])
    assert [line.split(":")[0].strip() for line in said[-3:]] == [name for name, _ in expected]
    assert names(path.parent) == ["file.beton.converting", "file.beton.quarantine.txt"]

    said.clear()
    manifest = convert_folder(copy, path, said, image=SMALLER, max_bad=3)
    assert "going on after the first 73 of 73 images" in said
    assert [bad.path for bad in manifest.quarantine] == [name for name, _ in expected]
    assert manifest.num_samples == 70
    files = sorted(list_folder(source).names)
    beton, _ = open_with_manifest(path)
    for sample, name in enumerate(files):
        if not name.startswith("c2/large"):
            assert bytes(beton.encoded(sample)) == (source / name).read_bytes(), name
    beton.close()


def test_a_source_of_bad_images_only(tmp_path: Path) -> None:
    (tmp_path / "source" / "c0").mkdir(parents=True)
    (tmp_path / "source" / "c0" / "a.jpg").write_bytes(b"bad")
    with pytest.raises(DataError, match="there is nothing else in the source"):
        convert_folder(tmp_path / "source", tmp_path / "file.beton", max_bad=5)


def test_a_file_that_is_there_is_not_touched_unless_asked(
    source: Path, undisturbed: Path, tmp_path: Path
) -> None:
    path = fresh(tmp_path)
    path.write_bytes(b"precious")
    with pytest.raises(ConfigError, match=r"exists already; delete it, or give --overwrite"):
        convert_folder(source, path, image=SMALLER)
    assert path.read_bytes() == b"precious"
    assert names(path.parent) == ["file.beton"]
    convert_folder(source, path, image=SMALLER, overwrite=True)
    assert_same(path, undisturbed)


def test_a_folder_is_no_destination(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is a folder; give the name of the file"):
        convert_folder(source, tmp_path)


def test_two_conversions_to_one_file_do_not_mix(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets_prep.conversion.state.LOCK_SECONDS", 0.3)
    state = ConversionState(tmp_path / "file.beton", list_folder(source))
    with pytest.raises(ConfigError, match="another conversion to the same file is running"):
        convert_folder(source, tmp_path / "file.beton")
    state.close()
    convert_folder(source, tmp_path / "file.beton")


def test_an_image_larger_than_a_page_is_named_with_the_flag_to_give(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", 3, 1, width=900, height=800)
    raw = ImageOptions(mode="raw", max_side=0)
    with pytest.raises(ConfigError, match=r"c0/0000.jpg takes 2,160,000 bytes.* give --page-size 8$"):
        convert_folder(source, tmp_path / "file.beton", image=raw, page_size=1 << 21)
    convert_folder(source, tmp_path / "file.beton", image=raw, page_size=1 << 23)
    with open_beton(tmp_path / "file.beton") as beton:
        assert beton.page_of_N.tolist() == [1, 1, 1]


def test_too_little_space_is_told_before_anything_is_done(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        usage = shutil.disk_usage(tmp_path)._replace(free=10_000)
        patched.setattr(shutil, "disk_usage", lambda _: usage)
        with pytest.raises(PclError, match=r"has 0.0 GB free, about 0.0 GB are needed: make room"):
            convert_folder(source, tmp_path / "file.beton")
    assert not (tmp_path / "file.beton").exists()
    convert_folder(source, tmp_path / "file.beton")


def test_a_worker_that_hangs_is_replaced_and_the_image_named(source: Path, tmp_path: Path) -> None:
    """The decoder of one image is stopped by a signal, as a stuck disk would stop it."""
    copy, path = tmp_path / "copy", tmp_path / "file.beton"
    shutil.copytree(source, copy)
    (copy / "c3" / "slow.jpg").write_bytes(encoded(picture(1, 9000, 9000), quality=20))  # about a second
    beats = tmp_path / "file.beton.converting" / "heartbeats"
    index = list_folder(copy).names.index("c3/slow.jpg")

    def stop_it() -> None:
        while time.monotonic() < deadline:
            time.sleep(0.002)
            if not beats.exists() or beats.stat().st_size < 8:
                continue
            if int(np.fromfile(beats, np.int64)[0]) == index + 1:
                (worker,) = workers_of(os.getpid())
                os.kill(worker, signal.SIGSTOP)
                return

    deadline = time.monotonic() + 40
    thread = threading.Thread(target=stop_it)
    thread.start()
    manifest = convert_folder(copy, path, image=SMALLER, max_bad=1, image_timeout=3.0)
    thread.join()
    assert [bad.path for bad in manifest.quarantine] == ["c3/slow.jpg"]
    assert manifest.quarantine[0].reason == "took longer than 3 seconds to decode"
    assert manifest.num_samples == 70


def workers_of(process: int) -> list[int]:
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [
        int(child)
        for child in children
        if b"datasets_prep.conversion.worker" in Path(f"/proc/{child}/cmdline").read_bytes()
    ]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"workers": -1}, "--workers -1: give 0 to 1024"),
        ({"max_bad": -1}, "--max-bad -1: give 0 or more"),
        ({"image": ImageOptions(quality=0)}, "--quality 0: give 1 to 100"),
        ({"image": ImageOptions(max_side=-5)}, "--max-side -5: give 0 to 65535"),
        ({"image_timeout": 0.0}, "--image-timeout 0: give a positive number"),
        ({"page_size": 3 << 20}, "--page-size 3: give a power of two"),
    ],
)
def test_impossible_options(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        ConvertOptions(**options)


def test_no_worker_is_left_over() -> None:
    assert workers_of(os.getpid()) == []
