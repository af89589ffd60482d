"""The tests that need a GPU, run by pytest: what they said, also if they did not come to their end."""

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pcl_fast
from pcl_fast.profile.gpu.bench import Bench, Row

ROOT = Path(pcl_fast.__file__).parents[1]
WORKERS = 4  # at once on one GPU: most of a test is compiling kernels
MARGIN = 8.0  # seconds in which what it said is still read
SHOWN = 30  # of the tests that failed, and characters of the log a hundred times that

# Kernels are tested with everything else, too: interpreted where there is no GPU, on the GPU where there is.
KERNEL_TESTS = (
    "tests/kernels/test_sgd_ema.py",
    "tests/kernels/test_pcl_loss.py",
    "tests/kernels/test_norm_act_triton.py",
    "tests/pipelines/test_views_triton.py",
)
# Of torch 2.11, when it compiles for the first time; to pytest every warning is an error here.
TORCHS_OWN = "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"
VERDICT = re.compile(r"^.*\b(PASSED|FAILED|ERROR|SKIPPED|XFAIL)\b.*$", re.MULTILINE)
SUMMARY = re.compile(r"^(?:=+ )?(\d+ [a-z0-9, ]+ in [\d.]+s\b)", re.MULTILINE)
BROKEN = re.compile(r"^((?:FAILED|ERROR) .+)$", re.MULTILINE)


def run_gpu_tests(bench: Bench) -> None:
    """`pytest -m gpu`."""
    bench.attempt({"what": "tests", "name": "pytest -m gpu"}, lambda: _pytest(bench, ["-m", "gpu"]))


def run_kernel_tests(bench: Bench) -> None:
    """The other tests of kernels."""
    about = {"what": "tests", "name": "pytest of the kernels"}
    bench.attempt(about, lambda: _pytest(bench, list(KERNEL_TESTS)))


def _pytest(bench: Bench, words: Sequence[str]) -> Row:
    if not (ROOT / "tests").is_dir():
        raise FileNotFoundError("there are no tests beside the package")
    command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider"]
    command += ["--continue-on-collection-errors", "-W", TORCHS_OWN, *words]
    if bench.tiny:
        command += ["--collect-only", "tests/gpu/test_training_on_cuda.py"]
    elif importlib.util.find_spec("xdist"):
        command += ["-n", str(WORKERS), "--dist", "loadfile"]
    return run_suite(command, bench.seconds_left() - MARGIN)


def run_suite(command: Sequence[str], seconds: float) -> Row:
    """What a run of pytest said within so many seconds."""
    with tempfile.TemporaryFile() as printed:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=printed,
            stderr=printed,
        )
        try:
            ended = f"exit code {process.wait(max(seconds, 1.0))}"
        except subprocess.TimeoutExpired:
            ended = f"stopped after {seconds:.0f} s"
            process.kill()  # workers of pytest-xdist end with it
            process.wait()
        printed.seek(0)
        text = printed.read().decode(errors="replace")
    found = SUMMARY.findall(text)
    counts = Counter(verdict.lower() for verdict in VERDICT.findall(text.split("short test summary")[0]))
    broken = list(dict.fromkeys(BROKEN.findall(text)))
    row: Row = {"summary": found[-1] if found else f"no summary: {ended}", "ended": ended}
    row |= {"counts": dict(counts), "broken": [line[:300] for line in broken[:SHOWN]]}
    return row | {"log": text[-100 * SHOWN :] if broken or not found else ""}
