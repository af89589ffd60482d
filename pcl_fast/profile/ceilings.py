"""What a device can do at most: multiply, move, start kernels. Known by its name, or measured in a second."""

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

PRODUCT_SIZES = {"cpu": (256, 512, 1024), "cuda": (4096, 8192)}
COPIED_BYTES = {"cpu": 128 << 20, "cuda": 512 << 20}  # several times the caches
SECONDS = 0.3  # for each thing that is measured
GRAPH_KERNELS = 1000
ASSUMED_KERNEL = 2.5e-6


@dataclass(frozen=True, slots=True)
class Ceilings:
    """FLOP/s of dense matrix products; bytes/s, read and written; seconds of the shortest kernel in a graph.

    `source`: who says so.
    """

    name: str
    flops: float
    bandwidth: float
    kernel_seconds: float
    source: str


def _published(name: str, teraflops: float, terabytes: float) -> Ceilings:
    return Ceilings(
        name, teraflops * 1e12, terabytes * 1e12, ASSUMED_KERNEL, "published, kernel time assumed"
    )


# By torch's name of the device. bfloat16 without sparsity, and memory, from the makers' data sheets; they are
# seldom reached: an H200 is said to make 989 TFLOP/s and 4.8 TB/s.
KNOWN = {
    known.name: known
    for known in (
        Ceilings("NVIDIA H200", 790e12, 4.3e12, ASSUMED_KERNEL, "measured, kernel time assumed"),
        _published("NVIDIA H100 80GB HBM3", 989.4, 3.35),
        _published("NVIDIA H100 PCIe", 756.5, 2.039),
        _published("NVIDIA A100-SXM4-80GB", 312, 2.039),
        _published("NVIDIA A100-SXM4-40GB", 312, 1.555),
        _published("NVIDIA A100 80GB PCIe", 312, 1.935),
        _published("NVIDIA A100-PCIE-40GB", 312, 1.555),
        _published("NVIDIA L40S", 362.05, 0.864),
        _published("NVIDIA GeForce RTX 4090", 165.2, 1.008),
    )
}


def find_ceilings(device: torch.device, dtype: torch.dtype, measured: bool = False) -> Ceilings:
    """The ceilings of a device: as known for a GPU, unless `measured` is wanted; else measured.

    A known GPU's products are bfloat16's, whatever `dtype`; measured ones are of `dtype`.
    """
    known = KNOWN.get(_name(device))
    return known if known is not None and not measured else measure_ceilings(device, dtype)


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """The best of repeated products and copies, in about a second; call it while nothing else runs.

    The least time of a kernel is that of one among many in a CUDA graph; on the CPU, which starts none, 0.
    """
    flops = max(_product_rate(size, device, dtype) for size in PRODUCT_SIZES[device.type])
    kernel = _graph_kernel_seconds(device) if device.type == "cuda" else 0.0
    return Ceilings(_name(device), flops, _copy_rate(device), kernel, "measured")


def _product_rate(size: int, device: torch.device, dtype: torch.dtype) -> float:
    # Of random numbers: on a GPU, products of constants take less power, and so less time.
    left, right, out = (torch.randn(size, size, device=device).to(dtype) for _ in range(3))
    return 2 * size**3 / _least_seconds(lambda: torch.mm(left, right, out=out), device)


def _copy_rate(device: torch.device) -> float:
    size = COPIED_BYTES[device.type]
    source, target = (torch.ones(size // 4, device=device) for _ in range(2))
    return 2 * size / _least_seconds(lambda: target.copy_(source), device)


def _graph_kernel_seconds(device: torch.device) -> float:
    number, graph = torch.zeros(1, device=device), torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.graph(graph):
        for _ in range(GRAPH_KERNELS):
            number.add_(1)
    return _least_seconds(graph.replay, device) / GRAPH_KERNELS


def _least_seconds(call: Callable[[], object], device: torch.device) -> float:
    """Of one call, the quickest of SECONDS, after two: what disturbs makes it slower only."""
    time_once = _time_on_gpu if device.type == "cuda" else _time
    for _ in range(2):
        time_once(call)
    best, until = float("inf"), time.perf_counter() + SECONDS
    while time.perf_counter() < until:
        best = min(best, time_once(call))
    return best


def _time(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _time_on_gpu(call: Callable[[], object]) -> float:
    """By the device's clock, several calls in a row: starting the first one is not seen."""
    calls = 10
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(calls):
        call()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3 / calls


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()}, {torch.get_num_threads()} threads"
