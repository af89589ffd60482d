"""Where and with what something was measured."""

import os
import platform
import subprocess
from pathlib import Path

import torch

import pcl_fast

PACKAGE = Path(pcl_fast.__file__).parent


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
        "commit": commit(),
    }


def commit() -> str:
    """The commit that this package is of, with `+` if something was changed since; or `unknown`."""
    if _git("ls-files", "__init__.py") is None:
        return "unknown"
    return f"{_git('rev-parse', '--short', 'HEAD')}{'+' if _git('status', '--porcelain', '-uno') else ''}"


def _git(*words: str) -> str | None:
    """What git says of this package's folder; None if that is nothing, or there is no git or repository."""
    try:
        done = subprocess.run(
            ["git", "-C", str(PACKAGE), *words], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")
