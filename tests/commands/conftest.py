"""Fixtures of this folder: a made-up data set that is CIFAR-10 in everything but its pictures."""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

from datasets_prep.cifar import CIFAR10, IMAGE_BYTES
from tests.conftest import REPOSITORY

Process = subprocess.CompletedProcess[str]


@pytest.fixture(scope="session")
def cifar_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with six files of 10,000 random images; all six are one file under six names."""
    root = tmp_path_factory.mktemp("data")
    folder = root / CIFAR10.folder
    folder.mkdir()
    records = np.random.default_rng(0).integers(0, 256, (10_000, 1 + IMAGE_BYTES), np.uint8)
    records[:, 0] = np.arange(10_000) % 10
    first, *others = (folder / batch.file for batch in CIFAR10.batches)
    first.write_bytes(records.tobytes())
    for path in others:
        os.link(first, path)
    return root


def environment(cifar_folder: Path) -> Mapping[str, str]:
    return {
        **os.environ,
        "PCL_FAST_DATA": str(cifar_folder),
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "200",
        "NO_COLOR": "1",
    }


@pytest.fixture(scope="session")
def pcl_fast(cifar_folder: Path) -> Callable[..., Process]:
    """Run `pcl-fast ARGUMENTS` in a process of its own."""

    def run(*arguments: str, cwd: Path) -> Process:
        return subprocess.run(
            [sys.executable, "-m", "pcl_fast", *arguments],
            cwd=cwd,
            env=environment(cifar_folder),
            capture_output=True,
            text=True,
            timeout=170,
        )

    return run
