"""What is listed of a folder: what torchvision's ImageFolder lists, or an error that says what to do."""

import os
from pathlib import Path

import pytest
from torchvision.datasets import ImageFolder

from datasets_prep.listings.listing import list_folder
from pcl_fast.errors import ConfigError, DataError
from tests.datasets_prep.pictures import encoded, picture, write_folder


def test_it_is_torchvisions_order(tmp_path: Path) -> None:
    write_folder(tmp_path, 9, 3)
    for name in (
        "c1/deeper/z.PNG",
        "c1/deeper/a.jpeg",
        "c1/Upper.JPEG",
        "B/first.webp",
        "c2/notes.txt",
        "top.jpg",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    listing, theirs = list_folder(tmp_path), ImageFolder(str(tmp_path))
    assert list(listing.classes) == theirs.classes
    paths = [listing.place(index).file for index in range(len(listing))]
    assert sorted(zip(paths, listing.labels_N.tolist(), strict=True)) == sorted(theirs.samples)
    assert listing.labels_N.tolist() == sorted(listing.labels_N.tolist())
    assert listing.ignored == ("c2/notes.txt",)


def test_hidden_files_are_not_images_and_links_are_followed(tmp_path: Path) -> None:
    write_folder(tmp_path / "source", 2, 1)
    (tmp_path / "source" / "c0" / "._0000.jpg").write_bytes(b"left by an archiver")
    (tmp_path / "source" / ".cache").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "far.jpg").write_bytes(encoded(picture(0)))
    (tmp_path / "source" / "c1").symlink_to(tmp_path / "elsewhere")
    listing = list_folder(tmp_path / "source")
    assert listing.names == ["c0/0000.jpg", "c0/0001.jpg", "c1/far.jpg"]
    assert listing.sizes_N.tolist() == [os.stat(listing.place(index).file).st_size for index in range(3)]


def test_an_identity_changes_with_the_image(tmp_path: Path) -> None:
    write_folder(tmp_path, 4, 2)
    before = list_folder(tmp_path)
    os.utime(tmp_path / "c0" / "0000.jpg", ns=(1, 1))
    (tmp_path / "c1" / "0003.jpg").write_bytes(b"")
    after = list_folder(tmp_path)
    same = [before.identity(index) == after.identity(index) for index in range(4)]
    assert same == [False, True, True, False]


def test_a_source_that_is_not_classes(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="absent does not exist"):
        list_folder(tmp_path / "absent")
    with pytest.raises(DataError, match="holds no folders"):
        list_folder(tmp_path)
    (tmp_path / "a.jpg").write_bytes(b"")
    with pytest.raises(
        DataError, match="holds images but no folders; give the folder that has one folder a class"
    ):
        list_folder(tmp_path)
    with pytest.raises(DataError, match="is not a folder"):
        list_folder(tmp_path / "a.jpg")


def test_splits_are_not_taken_for_classes(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", 2, 2)
    write_folder(tmp_path / "val", 2, 2)
    with pytest.raises(
        ConfigError, match=r"holds train and val, which are splits, .*beginning with .*train$"
    ):
        list_folder(tmp_path)
    assert len(list_folder(tmp_path / "train")) == 2


def test_an_empty_class_and_a_broken_link_are_named(tmp_path: Path) -> None:
    write_folder(tmp_path, 2, 2)
    (tmp_path / "c1" / "broken.jpg").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"broken\.jpg cannot be read: No such file"):
        list_folder(tmp_path)
    (tmp_path / "c1" / "broken.jpg").unlink()
    (tmp_path / "c9").mkdir()
    with pytest.raises(DataError, match="c9 holds no images"):
        list_folder(tmp_path)
