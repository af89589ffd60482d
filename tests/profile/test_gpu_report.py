"""The page of a GPU's measurements: figures worked out by hand, and a section that leaves the rest alone."""

import re
from pathlib import Path
from typing import Any

import pytest

from pcl_fast.errors import DataError
from pcl_fast.profile.gpu.found import FILE, Found
from pcl_fast.profile.gpu.report import BEGIN, END, render, write_section
from pcl_fast.profile.gpu.runner import Outcome, Part
from pcl_fast.profile.gpu.tables import figure, percent, spread

ABOUT = {"date": "2026-01-02T03:04:05+00:00", "commit": "abc1234", "command": "pcl-fast profile gpu"}
CLOCKS = {"clocks.sm": "1755 MHz", "clocks.max.sm": "1980 MHz", "clocks.mem": "3201 MHz"}
MACHINE = {"gpu": "NVIDIA X", "python": "3.12.3", "torch": "2.11.0", "cuda": "13.0", "cudnn": 91000}
NETWORK = {"model": "resnet32", "batch": 128}
CEILINGS = {
    "name": "NVIDIA X",
    "flops": 8e14,
    "bandwidth": 4e12,
    "kernel_seconds": 2e-6,
    "source": "measured",
}


def step(mode: str, milliseconds: float, method: str = "pcl", augmented: bool = False, **more: Any) -> Any:
    row = {"what": "step", "mode": mode, **NETWORK, "method": method, "augmented": augmented, **more}
    return row | {"seconds": [milliseconds / 1e3] * 10, "peak_bytes": 3 << 30}


def floor(seconds: float, **more: Any) -> Any:
    row = {"what": "floor", **NETWORK, "method": "pcl", "flops": 4e11, **more}
    return row | {"floor_seconds": {"fused": seconds}, "ceilings": CEILINGS}


def norm(by: str, seconds: list[float]) -> Any:
    row = {"what": "norm", "case": "a | b", "by": by, "bytes": 20_000_000}
    return row | {"forward_seconds": [3e-6], "seconds": seconds}


DEVICE = [
    {"what": "machine", **MACHINE, "triton": "3.6.0", "driver": "580.1", "cpu": "Some"},
    {"what": "clocks", **CLOCKS},
    {"what": "kernel", "name": "empty", "kernels": 1000, "seconds": [1.5e-6, 2e-6, 1e-6]},
    {"what": "copy", "gib": 1.0, "seconds": [2**31 / 4e12], "bandwidth": 4e12},
    {"what": "product", "size": 8192, "seconds": [2 * 8192**3 / 8e14], "flops": 8e14},
]
STEPS = [
    step("captured", 2.0),
    step("eager", 20.0),
    step("captured", 1.0, method="vanilla"),
    step("captured", 2.5, augmented=True),
    step("baseline", 12.0),
    step("baseline-amp", 8.0),
    floor(1.2e-3),
    step("captured", 40.0, model="resnet18", batch=64),
    floor(24e-3, model="resnet18", batch=64),
    {**step("captured-compiled", 1.0), "failed": "RuntimeError: no compiler"},
]  # fmt: skip
REST = [
    {"what": "update", "by": "ours", "weights": 1_000_000, "bytes": 32_000_000, "seconds": [1e-5]},
    {"what": "loss", "by": "ours", "batch": 128, "classes": 100, "bytes": 1, "seconds": [7e-6]},
    {"what": "loss", "by": "torch", "batch": 128, "classes": 100, "bytes": 1, "seconds": [7e-5]},
    norm("ours", [10e-6]),
    norm("torch", [30e-6]),
    {"what": "views", "name": "some", "batch": 256, "views": 3, "bytes": 2_000_000, "seconds": [1e-6]},
    {"what": "seeds", "name": "1 together", "runs": 1, **NETWORK, "seconds": [2e-3]},
    {"what": "seeds", "name": "3 together", "runs": 3, **NETWORK, "seconds": [5e-3]},
    {"what": "choice", "name": "as it is", "runs": 1, **NETWORK, "seconds": [2e-3]},
    {"what": "choice", "name": "otherwise", "runs": 1, **NETWORK, "seconds": [3e-3]},
    {"what": "update share", **NETWORK, "weights": 1_000_000, "seconds": [1e-5], "step_seconds": [2e-3]},
    {"what": "count", "mode": "captured", **NETWORK, "kernels": 600, "copies": 3, "launches": 1, "graphs": 1},
    {"what": "tests", "name": "pytest -m gpu", "summary": "1 failed in 3.0s", "broken": ["FAILED a.py::b"]},
]  # fmt: skip


def found_of(*parts: tuple[str, str, list[Any]]) -> Found:
    found = Found()
    for name, status, rows in parts:
        part = Part(name=name, about="some", limit=10, command=lambda rows, seconds: [])
        found.put(part, Outcome(status=status, seconds=1.0, rows=rows), ABOUT)
    return found


@pytest.fixture
def found() -> Found:
    late = ("late", "not run: 3 s were left of 480 s", [])
    return found_of(
        ("device", "done", DEVICE), ("steps", "killed after 60 s", STEPS), ("rest", "done", REST), late
    )


def cells(text: str, start: str) -> list[str]:
    (line,) = (line for line in text.splitlines() if line.startswith(f"| {start}"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_steps_against_the_floor_and_alone(found: Found) -> None:
    line = cells(render(found), "resnet32 | 128 | 2.00")
    assert line[2:7] == ["2.00 (2.00 - 2.00)", "64,000", "20.0 (20.0 - 20.0)", "-", "-"]
    assert line[7:] == ["60 %", "25 %", "3.00", "1.00", "0.67"]
    assert cells(render(found), "resnet18 | 64 | 40.0")[7:] == ["60 %", "1.2 %", "3.00", "-", "-"]


def test_goals(found: Found) -> None:
    text = render(found)
    goals = {
        name: cells(text, name)[-1]
        for name in ("ResNet-32, CIFAR", "the same, 3 seeds", "over the", "PCL(3)")
    }
    assert goals["ResNet-32, CIFAR"].startswith("4.9 min, projected")  # 300 epochs of 390 steps of 2.5 ms
    assert goals["the same, 3 seeds"].startswith("9.8 min, projected")
    assert goals["over the"] == "6.0x, computing alone; 4.0x over the same in bfloat16, channels-last"
    assert goals["PCL(3)"] == "resnet32 @128 0.67"
    assert "takes 20 % of a step" in cells(text, "GPU idle")[-1]
    assert cells(text, "of the fused-byte floor, ImageNet")[-1] == "resnet18 @64 60 %"
    update = cells(text, "optimizer and averages")[-1]
    assert update == "one kernel: resnet32 @128 0.5 % of a step, 1 M weights 80 % of copy bandwidth"
    assert cells(text, "losses, forward and backward")[-1] == "2 kernels, 7.00 us together (100 classes)"
    assert cells(text, "host calls")[-1] == "1, of which 1 replay"
    nothing = render(found_of(("device", "done", [])))
    assert nothing.count("| not measured |") == 9


def test_kernels_and_the_device(found: Found) -> None:
    text = render(found)
    assert cells(text, "kernel in a graph of 1,000: empty")[1] == "1.50 (1.00 - 2.00) us"
    assert cells(text, "copy of 1 GiB")[1].startswith("4.00 (")
    assert cells(text, "product of random")[1] == "800 (800 - 800) TFLOP/s"
    assert cells(text, "1 M | ours")[2:] == ["10.0 (10.0 - 10.0)", "3.20", "80 %"]
    assert cells(text, "128 | 100 | 7.00")[2:] == ["7.00 (7.00 - 7.00)", "70.0 (70.0 - 70.0)", "-"]
    assert cells(text, "a / b | ours")[3:] == ["10.0 (10.0 - 10.0)", "2.00", "50 %"]
    assert cells(text, "a / b | torch")[3:] == ["30.0 (30.0 - 30.0)", "-", "-"]
    assert cells(text, "some | 256")[4:] == ["256,000,000", "50 %"]
    assert cells(text, "resnet32 | 128 | 3 together")[-1] == "2.50"
    assert cells(text, "resnet32 | 128 | otherwise")[-1] == "1.50"
    assert "NVIDIA X, driver 580.1, python 3.12.3, torch 2.11.0, cuda 13.0, cudnn 91000, triton 3.6.0" in text
    assert "clock 1755 MHz, of 1980 MHz, memory 3201 MHz." in text
    assert "2026-01-02, commit abc1234, `pcl-fast profile gpu`" in text


def test_what_failed_or_was_not_run_is_told(found: Found) -> None:
    told = render(found).split("### Failed or not run")[1]
    assert "- late: not run: 3 s were left of 480 s" in told
    assert "- steps: killed after 60 s" in told
    assert "- steps: step captured-compiled resnet32 128 pcl" in told
    assert "RuntimeError: no compiler" in told
    assert "- pytest -m gpu: FAILED a.py::b" in told
    assert "Nothing." in render(found_of(("device", "done", DEVICE)))


def test_every_table_is_one(found: Found) -> None:
    tables = re.findall(r"(?:^\|.*\|$\n?)+", render(found), re.MULTILINE)
    assert len(tables) == 12
    for table in tables:
        assert len({line.count("|") for line in table.splitlines()}) == 1, table


def test_the_section_is_replaced_and_the_rest_left_alone(tmp_path: Path, found: Found) -> None:
    page = tmp_path / "page.md"
    write_section(page, found)
    assert page.read_text() == f"{BEGIN}\n{render(found)}\n{END}\n"
    page.write_text("# Title\n\nbefore\n")
    write_section(page, found)
    first = page.read_text()
    assert first.startswith(f"# Title\n\nbefore\n\n{BEGIN}\n")
    write_section(page, found)
    assert page.read_text() == first
    page.write_text(first + "\nafter\n")
    smaller = found_of(("device", "done", DEVICE))
    write_section(page, smaller)
    assert page.read_text() == f"# Title\n\nbefore\n\n{BEGIN}\n{render(smaller)}\n{END}\n\nafter\n"


@pytest.mark.parametrize("text", [f"a\n{BEGIN}\n", f"{END}\nb", f"{END}\n{BEGIN}\n"])
def test_a_page_with_broken_marks_is_left_alone(tmp_path: Path, found: Found, text: str) -> None:
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(DataError, match="or neither"):
        write_section(page, found)
    assert page.read_text() == text


def test_what_is_kept_is_read_again(tmp_path: Path, found: Found) -> None:
    found.save(tmp_path / FILE)
    again = Found.load(tmp_path / FILE)
    assert again.parts == found.parts
    assert render(again) == render(found)
    assert again.ceilings.bandwidth == 4e12
    assert again.ceilings.kernel_seconds == 1e-6
    assert again.row("step", mode="captured-compiled") is None  # it failed
    assert Found.load(tmp_path / "other.json").parts == {}


def test_numbers_are_short() -> None:
    assert [figure(value) for value in (1234.5, 99.94, 9.994, 0.01234)] == ["1,234", "99.9", "9.99", "0.0123"]
    assert [percent(share) for share in (0.0123, 0.5, 1.2)] == ["1.2 %", "50 %", "120 %"]
    assert spread([3e-6, 1e-6, 2e-6], 1e6) == "2.00 (1.00 - 3.00)"
