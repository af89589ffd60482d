"""What this process and its workers use of the machine, and what nobody uses; elsewhere than on Linux, 0."""

import contextlib
import ctypes
import multiprocessing
import os
import time
from pathlib import Path

import torch

RESET_PEAK = "5"  # what /proc/PID/clear_refs takes for that (proc(5))
TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


def cpu_seconds() -> float:
    """Processor time of this process and the workers it has now."""
    return time.process_time() + sum(_child_seconds(child.pid) for child in multiprocessing.active_children())


def cores_available() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def idle_seconds() -> float:
    """Time that the machine's cores have spent on nothing, waiting for disks included, since it started."""
    try:
        user_nice_system_idle_wait = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:6]
    except OSError:
        return 0.0
    return sum(map(int, user_nice_system_idle_wait[3:])) / TICKS


def memory_in_use() -> int:
    """Bytes of this process and its workers that are not a file's; what they share counts once."""
    pids = ["self", *(str(child.pid) for child in multiprocessing.active_children())]
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):  # elsewhere than on Linux, or of a worker that has just ended
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith(("Pss_Anon:", "Pss_Shmem:")):
                    total += 1024 * int(line.split()[1])
    return total


def _child_seconds(pid: int | None) -> float:
    try:
        # The name in brackets may hold anything; 11 fields after it come the ticks, of user and system.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / TICKS


class PeakMemory:
    """The most that was in use on a device since this was made, beyond what was before.

    On the CPU that of this process; what was freed before, and kept for later, is given back first.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)
        else:
            getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)(0)
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text(RESET_PEAK)
            self._before = _status_bytes("VmRSS")

    def read(self) -> int:
        """Bytes; elsewhere than on Linux, 0 for the CPU."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) - self._before
        return max(0, _status_bytes("VmHWM") - self._before)


def _status_bytes(name: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), 0)
