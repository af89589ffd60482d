"""Every part at tiny sizes: on the CPU with Triton interpreted, on a GPU where there is one."""

import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from pcl_fast.commands.profile_gpu import JOBS
from pcl_fast.commands.profile_gpu_views import open_random
from pcl_fast.profile.ceilings import Ceilings
from pcl_fast.profile.gpu.bench import UNKNOWN, Bench, Row
from pcl_fast.profile.gpu.device import measured_ceilings
from pcl_fast.profile.gpu.suites import run_suite
from tests.conftest import HAS_GPU

DEVICE = torch.device("cuda" if HAS_GPU else "cpu")


def tiny_bench(rows: list[Row]) -> Bench:
    return Bench(
        device=DEVICE,
        add=rows.append,
        open_loader=partial(open_random, True),
        samples=2,
        seconds=0.0,
        tiny=True,
        left=60.0,
    )


def run(name: str) -> list[Row]:
    """The rows of a part, none of which may have failed; a CPU captures nothing."""
    rows: list[Row] = []
    JOBS[name].run(tiny_bench(rows))
    assert [row for row in rows if "failed" in row] == []
    refused = [row for row in rows if "refused" in row]
    assert HAS_GPU or {row["refused"] for row in refused} <= {"cpu has no CUDA graphs"}
    assert not HAS_GPU or refused == []
    for row in rows:
        for key, values in row.items():
            if key.endswith("seconds") and isinstance(values, list):
                assert len(values) == 2, (row, key)
                assert all(0 < value < 60 for value in values), (row, key)
    return [row for row in rows if "refused" not in row]


def test_device() -> None:
    rows = run("device")
    assert [row["what"] for row in rows] == ["machine", *["kernel"] * 4, *["launch"] * 2, "copy", "product"]
    assert rows[0]["torch"] == torch.__version__
    found = measured_ceilings(rows)
    assert found.source == "measured"
    assert found.flops == rows[-1]["flops"]
    assert found.bandwidth == rows[-2]["bandwidth"]
    assert measured_ceilings(rows[:-1]) == UNKNOWN
    least = min(min(row["seconds"]) for row in rows if row["what"] == "kernel")
    assert found == Ceilings(rows[0]["gpu"], found.flops, found.bandwidth, least, "measured")


def test_steps_of_the_paper_row() -> None:
    rows = run("paper-row")
    best = "captured" if HAS_GPU else "eager"
    steps = [(row["mode"], row["method"], row["augmented"]) for row in rows if row["what"] == "step"]
    assert set(steps) >= {(best, "pcl", False), (best, "pcl", True), (best, "vanilla", False)}
    assert set(steps) >= {("baseline", "pcl", False), ("baseline-amp", "pcl", False)}
    (floor,) = (row for row in rows if row["what"] == "floor")
    assert floor["ceilings"]["name"] == UNKNOWN.name
    assert 0 < floor["floor_seconds"]["ideal"] <= floor["floor_seconds"]["fused"]


def test_steps_of_imagenet() -> None:
    rows = run("imagenet")
    assert {row["model"] for row in rows} == {"resnet18"}
    assert {row["what"] for row in rows} == {"step", "floor"}


def test_updates_and_losses() -> None:
    assert [row["by"] for row in run("updates")] == ["ours", "torch"]
    assert [row["by"] for row in run("losses")] == ["ours", "torch", "autograd"]


def test_norms_also_compiled() -> None:
    rows = run("norms") + run("compiled-norms")
    assert [row["by"] for row in rows] == ["ours", "torch"] * 2 + ["torch.compile"] * 2
    for row in rows:
        size = 2 * row["shape"][0] * 16 * 4 * 4
        assert row["forward_bytes"] == (3 + row["residual"]) * size
        assert row["bytes"] == (10 + row["residual"]) * size
        assert min(row["seconds"]) > 0.5 * min(row["forward_seconds"])


def test_choices_seeds_and_shares() -> None:
    assert [row["runs"] for row in run("seeds")] == [1, 2, 3]
    assert len(run("choices")) == 6
    (share,) = run("update-share")
    assert share["seconds"][0] < share["step_seconds"][0]


def test_views() -> None:
    names = [row["name"] for row in run("views")]
    assert names[:2] == ["CIFAR, resident", "CIFAR, an epoch laid out"]
    assert len(names) == 4


def test_counts() -> None:
    rows = run("counts")
    assert {"baseline", "baseline-amp", "eager"} <= {row["mode"] for row in rows}
    assert all(row["launches"] > 10 for row in rows if row["mode"] != "captured")


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
    bench = Bench(
        device=DEVICE, add=print, open_loader=partial(open_random, True), samples=3, seconds=0.02
    )
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
    row = run_suite([*words, "-c", "/dev/null", str(tmp_path)], seconds=60 if seconds == 0 else 8)
    if seconds == 0:
        assert row["summary"].startswith("1 failed, 2 passed, 1 skipped in ")
        assert row["counts"] == {"passed": 2, "failed": 1, "skipped": 1}
        assert len(row["broken"]) == 1
        assert "test_bad" in row["broken"][0]
        assert "assert 1 == 2" in row["log"]
    else:
        assert row["summary"] == "no summary: stopped after 8 s"
        assert row["counts"] == {"passed": 1, "failed": 1, "skipped": 1}
        assert "test_bad FAILED" in row["log"]


def test_the_command_rehearses_in_processes_of_their_own(tmp_path: Path) -> None:
    from pcl_fast.profile.gpu.found import FILE, Found

    out = tmp_path / "measurements"
    words = [sys.executable, "-m", "pcl_fast", "profile", "gpu", "--rehearse", "--out", str(out)]
    root = Path(__file__).resolve().parents[2]
    for only in ("device", "updates"):
        done = subprocess.run([*words, "--only", only], cwd=root, capture_output=True, text=True, timeout=50)
        assert done.returncode == 0, done.stdout + done.stderr
    found = Found.load(out / FILE)
    assert [(name, part["status"]) for name, part in found.parts.items()] == [
        ("device", "done"),
        ("updates", "done"),
    ]
    assert found.parts["updates"]["command"] == "pcl-fast profile gpu --only updates --rehearse"
    page = (tmp_path / "measurements.md").read_text()
    assert "### The device" in page
    assert "| 0.003 M | ours |" in page
    (tmp_path / "measurements.md").unlink()
    done = subprocess.run([*words, "--render"], cwd=root, capture_output=True, text=True, timeout=50)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "measurements.md").read_text() == page
