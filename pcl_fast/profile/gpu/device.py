"""What the device itself can do: the least time of a kernel and of its launch, copies, products."""

import math
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from pcl_fast.profile.ceilings import ASSUMED_KERNEL, Ceilings
from pcl_fast.profile.gpu.bench import UNKNOWN, Bench, Row
from pcl_fast.profile.machine import machine

KERNELS = 1000
ASKED = "name,driver_version,memory.total,clocks.sm,clocks.max.sm,clocks.mem,temperature.gpu,power.draw"


def measure_device(bench: Bench) -> None:
    """The machine; the least times; copies of 1 GiB; products of random matrices."""
    bench.attempt({"what": "machine"}, lambda: _machine(bench.device))
    kernels = KERNELS // 100 if bench.tiny else KERNELS
    for name, make in _CALLS.items():
        about = {"what": "kernel", "name": name, "kernels": kernels}
        bench.attempt(about, lambda make=make: {"seconds": bench.time_graph(make(bench.device), kernels)})
    about = {"what": "streams", "name": "adds of 1 element, on 3 streams", "kernels": kernels}
    bench.attempt(
        about, lambda: {"seconds": [each / kernels for each in bench.time(_forked(bench, kernels))]}
    )
    bench.attempt({"what": "launch", "name": "add of 1 element, from the host"}, lambda: _launch(bench))
    bench.attempt({"what": "launch", "name": f"graph of {kernels} kernels"}, lambda: _replay(bench, kernels))
    for gib in bench.pick((1.0, 4.0), (2**-16,)):
        bench.attempt({"what": "copy", "gib": gib}, lambda gib=gib: _copy(bench, round(gib * 2**30)))
    for size in bench.pick((4096, 8192), (64,)):
        bench.attempt({"what": "product", "size": size}, lambda size=size: _product(bench, size))
    bench.attempt({"what": "clocks"}, lambda: _ask_driver() if bench.device.type == "cuda" else {})


def measured_ceilings(rows: Sequence[Row]) -> Ceilings:
    """The best of what `measure_device` has found; where it found nothing, what is known of an H200."""
    flops = [row["flops"] for row in rows if row["what"] == "product" and "flops" in row]
    copied = [row["bandwidth"] for row in rows if row["what"] == "copy" and "bandwidth" in row]
    kernels = [min(row["seconds"]) for row in rows if row["what"] == "kernel" and row.get("seconds")]
    names = [row["gpu"] for row in rows if row["what"] == "machine" and "gpu" in row]
    if not flops or not copied:
        return UNKNOWN
    least = min(kernels, default=ASSUMED_KERNEL)
    return Ceilings(names[0] if names else "a GPU", max(flops), max(copied), least, "measured")


def _machine(device: torch.device) -> Row:
    """Hardware, driver and versions."""
    row: Row = {**machine(), "cuda": torch.version.cuda, "triton": _triton(), "driver": "none", "cudnn": None}
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        row |= {"multiprocessors": found.multi_processor_count, "memory_bytes": found.total_memory}
        row |= {"cache_bytes": getattr(found, "L2_cache_size", None)}
        row |= {"cudnn": torch.backends.cudnn.version()}
        row |= {"driver": _ask_driver().get("driver_version", "unknown")}
    return row


def _ask_driver() -> dict[str, str]:
    """What nvidia-smi says of the card as it is now; nothing where there is none."""
    try:
        command = ["nvidia-smi", f"--query-gpu={ASKED}", "--format=csv,noheader"]
        text = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    values = [value.strip() for value in text.splitlines()[0].split(",")] if text else []
    return dict(zip(ASKED.split(","), values, strict=False))


def _triton() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return str(triton.__version__)


Calls = list[Callable[[], object]]


def _empty(device: torch.device) -> Calls:
    """A kernel of one thread that does nothing."""
    if device.type != "cuda":
        return [lambda: None]
    return [lambda: torch.cuda._sleep(0)]  # pyright: ignore[reportPrivateUsage]


def _adds(elements: int) -> Callable[[torch.device], Calls]:
    def make(device: torch.device) -> Calls:
        number = torch.zeros(elements, device=device)
        return [lambda: number.add_(1)]

    return make


_CALLS: dict[str, Callable[[torch.device], Calls]] = {
    "empty": _empty,
    "adds of 1 element, each after the last": _adds(1),
    "adds of 65,536 elements, each after the last": _adds(1 << 16),
}


def _forked(bench: Bench, kernels: int) -> Callable[[], None]:
    """The same adds, a third of them on each of three streams of the graph."""
    from pcl_fast.streams import Fork

    numbers = [torch.zeros(1, device=bench.device) for _ in range(3)]
    fork = Fork(bench.device, 2)

    def add(number: torch.Tensor) -> None:
        for _ in range(kernels // 3):
            number.add_(1)

    return bench.graph([lambda: fork([lambda number=number: add(number) for number in numbers])])


def _launch(bench: Bench) -> Row:
    number = torch.zeros(1, device=bench.device)
    return {"seconds": bench.time(lambda: number.add_(1))}


def _replay(bench: Bench, kernels: int) -> Row:
    """What the host needs to start a graph, without waiting for it."""
    number = torch.zeros(1, device=bench.device)
    replay = bench.graph([lambda: number.add_(1)] * kernels)
    seconds: list[float] = []
    for _ in range(bench.samples + 1):
        if bench.device.type == "cuda":
            torch.cuda.synchronize(bench.device)
        began = time.perf_counter()
        replay()
        seconds.append(time.perf_counter() - began)
    return {"seconds": seconds[1:]}


def _copy(bench: Bench, size: int) -> Row:
    source, target = (torch.randn(size // 4, device=bench.device) for _ in range(2))
    seconds = bench.time(lambda: target.copy_(source))
    return {"seconds": seconds, "bandwidth": 2 * size / statistics.median(seconds)}


def _product(bench: Bench, size: int) -> Row:
    """Of random numbers: with zeros or ones a GPU draws less power and is faster than it ever is."""
    options: dict[str, Any] = {"device": bench.device, "dtype": torch.bfloat16}
    left, right = (torch.randn(size, size, **options) / math.sqrt(size) for _ in range(2))
    out = torch.empty_like(left)
    seconds = bench.time(lambda: torch.mm(left, right, out=out))
    return {"seconds": seconds, "flops": 2 * size**3 / statistics.median(seconds)}
