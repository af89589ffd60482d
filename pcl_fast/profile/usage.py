"""What this process and its workers use of the machine, and what nobody uses; elsewhere than on Linux, 0."""

import contextlib
import multiprocessing
import os
import time
from pathlib import Path

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
