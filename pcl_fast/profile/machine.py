"""Where and with what something was measured."""

import os
import platform
from pathlib import Path

import torch

import pcl_fast
from pcl_fast.commit import commit


def machine() -> dict[str, str]:
    """Processor, threads, load and GPU; versions, and the commit if this package runs from a repository."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "cpu": _processor(),
        "threads": str(torch.get_num_threads()),
        "load": f"{os.getloadavg()[0]:.2f}",
        "gpu": gpu,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pcl_fast": pcl_fast.__version__,
        "commit": commit() or "unknown",
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")
