"""Kernels in Triton compiled for a GPU that need not be there."""

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]


def assert_compiles(code: str, cache: Path) -> None:
    """Run code that compiles kernels and prints `compiled`; nothing is interpreted, `cache` is empty."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)}
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=55,
    )
    assert run.stdout == "compiled\n", run.stderr
