"""What a step makes the device and the host do, counted and drawn by torch's profiler."""

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from pcl_fast import atomic

LAUNCH = re.compile(r"cu(da)?(GraphLaunch|LaunchKernel|LaunchCooperativeKernel)")
TRANSFER = re.compile(r"cu(da)?Mem(cpy|set)")
COPY = re.compile(r"Mem(cpy|set)\b")
QUIET = "7"  # of the profiler's own log, which else tells its stages, and on a machine without a GPU errors


@dataclass(frozen=True, slots=True)
class KernelCounts:
    """What one step does.

    On a GPU: `kernels` and `copies` (and fills) that ran on it; `launches`, the host's calls that started
    any of these, of which `graphs` started a CUDA graph. On the CPU `launches` are the operations that torch
    dispatched, without those that others call, and without C++ that is called past torch.
    """

    launches: int
    kernels: int | None = None
    copies: int = 0
    graphs: int = 0


def count_kernels(step: Callable[[], object], device: torch.device) -> KernelCounts:
    """Call `step` once and count; call it before, so that nothing is compiled or captured meanwhile."""
    events = list(_recorded(step, device, 1).events() or [])
    return _count_on_gpu(events) if device.type == "cuda" else _count_on_cpu(events)


def write_trace(path: Path, step: Callable[[], object], device: torch.device, steps: int = 3) -> None:
    """Call `step` so many times and write what happened to a file for chrome://tracing or Perfetto (JSON)."""
    recorded = _recorded(step, device, steps)
    with atomic.replacing(path) as temporary:
        recorded.export_chrome_trace(str(temporary))


def _recorded(step: Callable[[], object], device: torch.device, steps: int) -> profile:
    os.environ.setdefault("KINETO_LOG_LEVEL", QUIET)  # read when a process profiles for the first time
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
        torch.cuda.synchronize(device)
    with profile(activities=activities, acc_events=True) as recorded:  # else torch 2.11 warns
        for _ in range(steps):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return recorded


def _count_on_gpu(events: list[Any]) -> KernelCounts:
    on_device = [e for e in events if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    copies = sum(bool(COPY.match(event.name)) for event in on_device)
    called = [event.name for event in events if event.device_type == DeviceType.CPU]
    launches = [name for name in called if LAUNCH.match(name)]
    return KernelCounts(
        kernels=len(on_device) - copies,
        launches=len(launches) + sum(bool(TRANSFER.match(name)) for name in called),
        copies=copies,
        graphs=sum("GraphLaunch" in name for name in launches),
    )


def _count_on_cpu(events: list[Any]) -> KernelCounts:
    operations = [event for event in events if _is_operation(event)]
    return KernelCounts(launches=sum(not any(map(_is_operation, _above(event))) for event in operations))


def _is_operation(event: Any) -> bool:
    return "::" in event.name and not event.name.startswith(("autograd::", "torch::"))


def _above(event: Any) -> Iterator[Any]:
    while (event := event.cpu_parent) is not None:
        yield event
