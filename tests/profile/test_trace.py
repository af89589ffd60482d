"""Counting what a step does, against steps whose operations are known."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from pcl_fast.profile import trace
from pcl_fast.profile.trace import KernelCounts, count_kernels, write_trace
from tests.conftest import REPOSITORY

CPU = torch.device("cpu")


def test_operations_of_the_cpu_without_those_inside() -> None:
    """linear calls t and addmm; t calls transpose, which calls as_strided; relu calls clamp_min."""
    weight, bias, x = torch.zeros(2, 3), torch.zeros(2), torch.zeros(4, 3)
    counted = count_kernels(lambda: torch.nn.functional.linear(x, weight, bias).relu(), CPU)
    assert counted == KernelCounts(launches=2)
    assert count_kernels(lambda: None, CPU) == KernelCounts(launches=0)


def test_backward_counts_and_twice_is_twice() -> None:
    a, b = (torch.randn(5, 5, requires_grad=True) for _ in range(2))

    def forward() -> torch.Tensor:
        return (a @ b).sum()

    def step() -> None:
        forward().backward()
        a.grad = b.grad = None

    once = count_kernels(step, CPU)
    assert count_kernels(forward, CPU).launches == 2
    assert once.launches >= 2 + 4, "ones, spread over the matrix, times either one"
    assert count_kernels(lambda: (step(), step()), CPU).launches == 2 * once.launches


def event(name: str, device: DeviceType = DeviceType.CPU, annotation: bool = False) -> SimpleNamespace:
    return SimpleNamespace(name=name, device_type=device, is_user_annotation=annotation)


def test_what_ran_on_a_gpu_and_what_started_it() -> None:
    """Names as the profiler gives them: a graph of two kernels, one launched kernel, a copy, a fill."""
    on_device = ["void cutlass::Kernel2<a>(b)", "triton_poi_fused_add_0", "void at::native::reduce_kernel<c>"]
    events = [event(name, DeviceType.CUDA) for name in on_device]
    events += [
        event("Memcpy HtoD (Pinned -> Device)", DeviceType.CUDA),
        event("Memset (Device)", DeviceType.CUDA),
    ]
    events += [event("Optimizer.step#SGD.step", DeviceType.CUDA, annotation=True)]
    events += [event(name) for name in ("cudaGraphLaunch", "cuLaunchKernelEx", "cudaMemcpyAsync")]
    events += [
        event(name) for name in ("cudaMemsetAsync", "cudaDeviceSynchronize", "cudaMalloc", "aten::add")
    ]
    events += [event("cudaStreamIsCapturing"), event("cudaOccupancyMaxActiveBlocksPerMultiprocessor")]
    assert trace._count_on_gpu(events) == KernelCounts(kernels=3, launches=4, copies=2, graphs=1)


def test_a_trace_is_a_file_that_shows_the_steps(tmp_path: Path) -> None:
    x = torch.zeros(3)
    write_trace(tmp_path / "new" / "trace.json", lambda: torch.special.bessel_j0(x), CPU, steps=4)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["trace.json"]
    events = json.loads((tmp_path / "new" / "trace.json").read_text())["traceEvents"]
    assert [e["name"] for e in events if e.get("cat") == "cpu_op"] == ["aten::special_bessel_j0"] * 4


def test_a_step_that_fails_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    path.write_text("old")

    def fails() -> None:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match=r"^no$"):
        write_trace(path, fails, CPU)
    assert path.read_text() == "old"
    assert [each.name for each in tmp_path.iterdir()] == ["trace.json"]
    assert count_kernels(lambda: torch.ones(1), CPU).launches == 1, "the next one is not disturbed"


def test_the_profiler_keeps_its_log_to_itself() -> None:
    """In a process of its own, for it reads the level once."""
    code = """
import torch
from pcl_fast.profile.trace import count_kernels
print(count_kernels(lambda: torch.ones(2) + 1, torch.device("cpu")).launches)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY)
    assert (done.stdout, done.stderr) == ("2\n", "")


@pytest.mark.gpu
def test_kernels_of_a_gpu_eager_and_captured() -> None:
    x = torch.zeros(1000, device="cuda")
    host = torch.zeros(1000, pin_memory=True)

    def step() -> None:
        for _ in range(5):
            x.add_(1)
        x.copy_(host, non_blocking=True)

    step()
    device = torch.device("cuda")
    count_kernels(step, device)  # the first one in a process starts the profiler
    assert count_kernels(step, device) == KernelCounts(kernels=5, launches=6, copies=1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    assert count_kernels(graph.replay, device) == KernelCounts(kernels=5, launches=1, copies=1, graphs=1)
