"""The device, kernels and views at tiny sizes; how parts measure; suites; the command's rehearsal."""

import signal
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from pcl_fast.cli import main
from pcl_fast.commands.profile.gpu_views import open_random
from pcl_fast.profile.ceilings import Ceilings
from pcl_fast.profile.gpu.bench import UNKNOWN, Bench, Row
from pcl_fast.profile.gpu.device import measured_ceilings
from pcl_fast.profile.gpu.found import FILE, Found
from pcl_fast.profile.gpu.suites import run_suite
from tests.conftest import HAS_GPU
from tests.profile.gpu_parts import DEVICE, run_tiny, tiny_bench


def test_device() -> None:
    rows = run_tiny("device")
    kinds = [row["what"] for row in rows]
    assert kinds == ["machine", *["kernel"] * 3, "streams", *["launch"] * 2, "copy", "product", "clocks"]
    assert rows[0]["torch"] == torch.__version__
    found = measured_ceilings(rows)
    assert found.source == "measured"
    assert found.flops == rows[-2]["flops"]
    assert found.bandwidth == rows[-3]["bandwidth"]
    assert measured_ceilings(rows[:-2]) == UNKNOWN
    least = min(min(row["seconds"]) for row in rows if row["what"] == "kernel")
    assert found == Ceilings(rows[0]["gpu"], found.flops, found.bandwidth, least, "measured")


def test_updates_and_losses() -> None:
    assert [row["by"] for row in run_tiny("updates")] == ["ours", "torch"]
    assert [row["by"] for row in run_tiny("losses")] == ["ours", "torch", "autograd"]


def test_norms_also_compiled() -> None:
    rows = run_tiny("norms") + run_tiny("compiled-norms")
    assert [row["by"] for row in rows] == ["ours", "torch"] * 2 + ["torch.compile"] * 2
    for row in rows:
        size = 2 * row["shape"][0] * 16 * 4 * 4
        assert row["forward_bytes"] == (3 + row["residual"]) * size
        assert row["bytes"] == (10 + row["residual"]) * size
        assert min(row["seconds"]) > 0.5 * min(row["forward_seconds"])


def test_views() -> None:
    names = [row["name"] for row in run_tiny("views")]
    assert names[:2] == ["CIFAR, resident", "CIFAR, an epoch laid out"]
    assert len(names) == 4


def test_a_measurement_that_fails_is_a_row_and_the_others_go_on() -> None:
    rows: list[Row] = []
    bench = tiny_bench(rows)

    def fail() -> Row:
        raise torch.OutOfMemoryError("too large\nmore about it")

    assert bench.attempt({"what": "a"}, fail) is None
    assert bench.attempt({"what": "b"}, lambda: {"x": 1}) == {"what": "b", "x": 1}
    assert rows == [{"what": "a", "failed": "OutOfMemoryError: too large"}, {"what": "b", "x": 1}]
    with pytest.raises(KeyboardInterrupt):
        bench.attempt({"what": "c"}, interrupt)


def interrupt() -> Row:
    raise KeyboardInterrupt


@pytest.mark.skipif(HAS_GPU, reason="the host's clock is that of a CPU")
def test_times_are_those_of_one_call() -> None:
    bench = Bench(device=DEVICE, add=print, open_loader=partial(open_random, True), samples=3, seconds=0.02)
    calls: list[float] = []

    def wait() -> None:
        calls.append(time.perf_counter())
        time.sleep(0.002)

    seconds = bench.time(wait)
    assert len(seconds) == 3
    assert all(0.002 <= each < 0.05 for each in seconds)
    assert 3 + 3 * 1 <= len(calls) <= 3 + 3 * 10  # about 20 ms a sample, after three calls
    calls.clear()
    seconds = bench.time_graph([wait, wait], least=3)
    assert all(0.002 <= each < 0.05 for each in seconds)
    assert len(calls) % 4 == 0


SUITE = """
import time, pytest
def test_good(): pass
def test_bad(): assert 1 == 2
@pytest.mark.skip
def test_left_out(): pass
def test_slow(): time.sleep({seconds})
"""


@pytest.mark.parametrize("seconds", [0, 60])
def test_a_suite_is_read_also_when_it_hangs(tmp_path: Path, seconds: int) -> None:
    (tmp_path / "test_some.py").write_text(SUITE.format(seconds=seconds))
    words = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider"]
    row = run_suite([*words, "-c", "/dev/null", str(tmp_path)], seconds=60 if seconds == 0 else 6)
    if seconds == 0:
        assert row["summary"].startswith("1 failed, 2 passed, 1 skipped in ")
        assert row["counts"] == {"passed": 2, "failed": 1, "skipped": 1}
        assert len(row["broken"]) == 1
        assert "test_bad" in row["broken"][0]
        assert "assert 1 == 2" in row["log"]
    else:
        assert row["summary"] == "no summary: stopped after 6 s"
        assert row["counts"] == {"passed": 1, "failed": 1, "skipped": 1}
        assert "test_bad FAILED" in row["log"]


def test_the_command_rehearses_in_processes_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    out, page = tmp_path / "measurements", tmp_path / "measurements.md"
    words = ["profile", "gpu", "--rehearse", "--out", str(out)]
    served = signal.getsignal(signal.SIGTERM)
    try:
        assert main([*words, "--only", "device,updates"]) == 0
    finally:
        signal.signal(signal.SIGTERM, served)
    found = Found.load(out / FILE)
    ended = [(name, part["status"]) for name, part in found.parts.items()]
    assert ended == [("device", "done"), ("updates", "done")], capsys.readouterr().out
    assert found.parts["updates"]["command"] == "pcl-fast profile gpu --only device,updates --rehearse"
    text = page.read_text()
    assert "### The device" in text
    assert "**A rehearsal" in text
    assert "| 0.003 M | ours |" in text
    page.unlink()
    assert main([*words, "--render"]) == 0
    assert page.read_text() == text
