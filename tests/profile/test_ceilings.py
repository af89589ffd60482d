"""Ceilings: what is known of GPUs, and what is measured here."""

import time
from collections.abc import Callable

import numpy as np
import pytest
import torch

from pcl_fast.profile import ceilings
from pcl_fast.profile.ceilings import KNOWN, Ceilings, find_ceilings, measure_ceilings

CPU = torch.device("cpu")


def test_what_is_measured_is_what_numpy_reaches_roughly(monkeypatch: pytest.MonkeyPatch) -> None:
    """numpy's products and copies are other code; the machine may be busy: hence the factors."""
    torch.set_num_threads(1)
    monkeypatch.setattr(ceilings, "PRODUCT_SIZES", {"cpu": (512,)})
    began = time.perf_counter()
    found = measure_ceilings(CPU, torch.float32)
    assert time.perf_counter() - began < 5
    assert (found.kernel_seconds, found.source) == (0.0, "measured")
    assert found.name.endswith(", 1 threads")
    matrix = np.ones((512, 512), np.float32)
    product = 2 * 512**3 / quickest(lambda: matrix @ matrix)
    assert product / 20 < found.flops < 20 * product
    block = np.ones(32 << 20, np.float32)
    copied = 2 * block.nbytes / quickest(block.copy)
    assert copied / 20 < found.bandwidth < 20 * copied


def quickest(call: Callable[[], object]) -> float:
    seconds: list[float] = []
    for _ in range(5):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def test_the_best_of_all_sizes_and_repeats_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls that take 0.2 and 5 ms to warm up, then 4, 1 and 3, by a clock of ours."""
    ticks = iter([0, 2e-4, 0, 5e-3, 0.0, 0.0, 0, 4e-3, 0.1, 0, 1e-3, 0.2, 0, 3e-3, 9.0])
    monkeypatch.setattr(ceilings.time, "perf_counter", lambda: next(ticks))
    calls: list[int] = []
    least = ceilings._least_seconds(lambda: calls.append(1), CPU)
    assert least == pytest.approx(1e-3)
    assert len(calls) == 5


def test_a_processor_is_measured_in_the_precision_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.dtype] = []

    def measure(device: torch.device, dtype: torch.dtype) -> Ceilings:
        asked.append(dtype)
        return Ceilings("", 1.0, 1.0, 0.0, "measured")

    monkeypatch.setattr(ceilings, "measure_ceilings", measure)
    for dtype in (torch.float32, torch.bfloat16):
        find_ceilings(CPU, dtype)
    assert asked == [torch.float32, torch.bfloat16]


def test_a_known_gpu_is_not_measured_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    other = Ceilings("here", 1.0, 1.0, 1.0, "measured")
    monkeypatch.setattr(ceilings, "measure_ceilings", lambda device, dtype: other)
    device = torch.device("cuda")
    known = find_ceilings(device, torch.bfloat16)
    assert (known.flops, known.bandwidth, known.kernel_seconds) == (790e12, 4.3e12, 2.5e-6)
    assert known.source == "measured, kernel time assumed"
    assert find_ceilings(device, torch.bfloat16, measured=True) is other
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA GeForce RTX 4090 Laptop GPU")
    assert find_ceilings(device, torch.bfloat16) is other, "a name that begins alike is another device"


def test_published_figures_say_so() -> None:
    for name, known in KNOWN.items():
        assert known.name == name
        assert known.source.startswith("measured" if name == "NVIDIA H200" else "published")
        assert 100e12 < known.flops < 1000e12, "dense, not sparse"
        assert 0.5e12 < known.bandwidth < 5e12


@pytest.mark.gpu
def test_a_gpu_s_ceilings_are_near_the_known_ones() -> None:
    found = measure_ceilings(torch.device("cuda"), torch.bfloat16)
    assert 0.2e-6 < found.kernel_seconds < 20e-6
    known = KNOWN.get(found.name)
    if known is None:
        pytest.skip(f"nothing is known of {found.name}")
    assert 0.6 * known.flops < found.flops < 1.15 * known.flops
    assert 0.7 * known.bandwidth < found.bandwidth < 1.15 * known.bandwidth
