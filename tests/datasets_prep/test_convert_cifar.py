"""CIFAR in a .beton file: the pixels and labels that `load_cifar` reads."""

from pathlib import Path

import numpy as np
import pytest

from datasets_prep.cifar import RELEASES, load_cifar
from datasets_prep.convert import ConvertOptions, convert
from datasets_prep.listings.cifar import CLASSES, list_cifar
from pcl_fast.beton import RAW
from pcl_fast.errors import DataError
from pcl_fast.manifest import open_with_manifest
from tests.commands.small_cifar import SMALL, write_files
from tests.datasets_prep.pictures import stopping_at


@pytest.mark.parametrize("split", ["train", "test"])
def test_pixels_and_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, split: str) -> None:
    monkeypatch.setitem(RELEASES, "cifar10", SMALL)
    write_files(tmp_path / "data")
    arrays = load_cifar("cifar10", tmp_path / "data")
    images = arrays.train_images if split == "train" else arrays.test_images
    labels = arrays.train_labels if split == "train" else arrays.test_labels
    listing = list_cifar("cifar10", split, tmp_path / "data")  # type: ignore[arg-type]
    convert(listing, tmp_path / "file.beton", ConvertOptions(workers=2), print, stopping_at(1 << 60))
    beton, manifest = open_with_manifest(tmp_path / "file.beton")
    assert manifest is not None
    assert manifest.classes[:2] == ("airplane", "automobile")
    assert beton.labels_N.tolist() == labels.tolist()
    assert set(beton.modes_N.tolist()) == {RAW}
    assert set(map(tuple, beton.sizes_N2.tolist())) == {(32, 32)}
    stored = np.stack([np.frombuffer(beton.encoded(i), np.uint8) for i in range(beton.num_samples)])
    np.testing.assert_array_equal(stored.reshape(-1, 32, 32, 3), images.transpose(0, 2, 3, 1))
    beton.close()


def test_without_the_data_set_the_command_to_get_it_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cifar100: .* is missing; run `pcl-fast fetch cifar100`"):
        list_cifar("cifar100", "train", tmp_path)


def test_there_are_as_many_names_as_classes() -> None:
    for name, classes in CLASSES.items():
        words = classes.split()
        assert len(words) == len(set(words)) == RELEASES[name].num_classes
        assert words == sorted(words)
