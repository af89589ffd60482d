"""Fixtures of this folder: the command line over a data set of 160 images."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from datasets_prep.cifar import RELEASES
from tests.commands.small_cifar import SMALL, write_files
from tests.conftest import REPOSITORY

Process = subprocess.Popen[str]


@pytest.fixture(scope="session")
def cifar_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data folder."""
    root = tmp_path_factory.mktemp("data")
    write_files(root)
    return root


@pytest.fixture
def small_cifar(cifar_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the data set the CIFAR-10 of this process."""
    monkeypatch.setitem(RELEASES, "cifar10", SMALL)
    monkeypatch.setenv("PCL_FAST_DATA", str(cifar_folder))
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture(scope="session")
def pcl_fast(cifar_folder: Path) -> Callable[..., Process]:
    """Start `pcl-fast WORDS` in a process of its own; it writes to pipes."""
    variables = {
        "PCL_FAST_DATA": str(cifar_folder),
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "200",
    }

    def start(*words: str, cwd: Path) -> Process:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.commands.small_cifar", *words],
            cwd=cwd,
            env={**os.environ, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start
