"""Settings of every test: one thread under xdist, fixed seeds, and visible skips for what is missing."""

import os
import random
from collections.abc import Iterator
from pathlib import Path

UNDER_XDIST = "PYTEST_XDIST_WORKER" in os.environ
if UNDER_XDIST:  # before torch and numpy are imported; child processes inherit it
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# Ask the driver's management library for devices: the usual question would break forking later.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

import numpy as np
import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[1]
HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:  # before the first import of triton: kernels then run on the CPU, interpreted
    os.environ.setdefault("TRITON_INTERPRET", "1")
if UNDER_XDIST:
    torch.set_num_threads(1)
# A first gradient before any test pretends to have a GPU: threads started for one break forking later.
torch.ones((), requires_grad=True).backward()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked `gpu` where there is no CUDA device, and say so."""
    if HAS_GPU:
        return
    skip = pytest.mark.skip(reason="no CUDA device here; on a machine with one: pytest -m gpu")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    """Start every test from the same seeds, and undo what it did to torch's global settings."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    deterministic = torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
    torch.use_deterministic_algorithms(deterministic)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets beside the repository; the test is skipped where there is none."""
    folder = REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no data sets at {os.path.relpath(folder, REPOSITORY)}")
    return folder
