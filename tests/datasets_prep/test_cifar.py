"""Reading the canonical files, and what is said when they are not there or not right."""

from pathlib import Path

import numpy as np
import pytest

from datasets_prep.cifar import CIFAR10, CIFAR100, cache_folder, load_cifar, load_release
from pcl_fast.errors import ConfigError, DataError
from tests.datasets_prep.tiny import Tiny, make_tiny


@pytest.fixture
def tiny(tmp_path: Path) -> Tiny:
    tiny = make_tiny(fields=2)
    tiny.write_binary(tmp_path / tiny.release.folder)
    return tiny


def test_published_sizes():
    # The sizes of the published files, from the data sets' page: records of 3073 and 3074 bytes.
    assert [batch.records * CIFAR10.record_bytes for batch in CIFAR10.batches] == [30_730_000] * 6
    assert [batch.records * CIFAR100.record_bytes for batch in CIFAR100.batches] == [153_700_000, 30_740_000]
    assert (CIFAR10.num_classes, CIFAR100.num_classes) == (10, 100)


def test_loads_what_was_written(tiny: Tiny, tmp_path: Path):
    arrays = load_release(tiny.release, tmp_path, verify=True)
    train = [batch.name for batch in tiny.release.train]
    np.testing.assert_array_equal(arrays.train_images, np.concatenate([tiny.images[name] for name in train]))
    np.testing.assert_array_equal(
        arrays.train_labels, np.concatenate([tiny.labels[name][:, 1] for name in train])
    )
    np.testing.assert_array_equal(arrays.test_images, tiny.images["test_batch"])
    np.testing.assert_array_equal(arrays.test_labels, tiny.labels["test_batch"][:, 1])
    assert arrays.train_images.dtype == np.uint8
    assert arrays.train_images.flags.c_contiguous
    assert arrays.train_labels.dtype == arrays.test_labels.dtype == np.int64
    assert arrays.num_classes == 100


def test_missing_set_names_path_and_command(tmp_path: Path):
    with pytest.raises(DataError) as caught:
        load_cifar("cifar100", tmp_path)
    assert str(tmp_path / "cifar-100-binary" / "train.bin") in str(caught.value)
    assert "`pcl-fast fetch cifar100`" in str(caught.value)


def test_cut_file_is_named(tiny: Tiny, tmp_path: Path):
    path = tmp_path / "tiny-bin" / "data_batch_2.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(
        DataError, match=r"data_batch_2\.bin has 6147 bytes, not 6148; run `pcl-fast fetch tiny`"
    ):
        load_release(tiny.release, tmp_path)


def test_flipped_bit_is_seen_by_verify_only(tiny: Tiny, tmp_path: Path):
    path = tmp_path / "tiny-bin" / "test_batch.bin"
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)
    load_release(tiny.release, tmp_path)
    with pytest.raises(DataError, match=rf"test_batch\.bin has the SHA-1 .*, not {tiny.release.test.sha1}"):
        load_release(tiny.release, tmp_path, verify=True)


def test_label_beyond_the_classes_is_refused(tiny: Tiny, tmp_path: Path):
    path = tmp_path / "tiny-bin" / "data_batch_1.bin"
    path.write_bytes(b"\x00\x64" + path.read_bytes()[2:])
    with pytest.raises(DataError, match=r"data_batch_1\.bin holds the label 100, classes end at 99"):
        load_release(tiny.release, tmp_path)


def test_unknown_name_gets_a_suggestion():
    with pytest.raises(ConfigError, match=r"'cifar-10'.*Did you mean 'cifar10'"):
        load_cifar("cifar-10")


@pytest.mark.parametrize(
    ("environment", "argument", "expected"),
    [
        ({}, None, "/home/someone/.local/share/pcl_fast"),
        ({"XDG_DATA_HOME": "/data"}, None, "/data/pcl_fast"),
        ({"XDG_DATA_HOME": "not/absolute"}, None, "/home/someone/.local/share/pcl_fast"),
        ({"XDG_DATA_HOME": "/data", "PCL_FAST_DATA": "/here"}, None, "/here"),
        ({"PCL_FAST_DATA": ""}, None, "/home/someone/.local/share/pcl_fast"),
        ({"PCL_FAST_DATA": "~/sets"}, None, "/home/someone/sets"),
        ({"PCL_FAST_DATA": "/here"}, "~/given", "/home/someone/given"),
    ],
)
def test_cache_folder(
    environment: dict[str, str], argument: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
):
    for name in ("XDG_DATA_HOME", "PCL_FAST_DATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/someone")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cache_folder(Path(argument) if argument else None) == Path(expected)
