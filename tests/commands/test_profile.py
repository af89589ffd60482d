"""`pcl-fast profile PRESET` on a small data set: tables, files, and what it says of what cannot be."""

import dataclasses
import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pcl_fast.cli import main
from pcl_fast.commands.profile.preset import ProfileOptions
from pcl_fast.commit import commit
from pcl_fast.device import resolve
from pcl_fast.errors import ConfigError, DataError
from pcl_fast.presets import find_preset
from pcl_fast.profile.machine import machine
from tests.conftest import REPOSITORY

SMALL = ("--data.subset", "32", "--train.batch-size", "8", "--model", "resnet8", "--device", "cpu")
ONCE = ("--repeats", "1", "--steps", "1", "--warmup", "1")


def printed(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.usefixtures("small_cifar")
def test_everything_about_a_preset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Short names of flags; a variant that cannot be leaves the others."""
    out, chart, trace = (tmp_path / name for name in ("out.json", "chart.png", "trace.json"))
    files = ("--json", str(out), f"--chart={chart}", "--trace", str(trace))
    words = ["profile", "cifar10-resnet32", "--against", "baseline,captured,eager,baseline-amp"]
    assert main([*words, *SMALL, "--repeats", "2", "--steps", "1", "--warmup", "1", *files]) == 0
    said, report = printed(capsys), json.loads(out.read_text())
    assert report["command"].startswith("pcl-fast profile cifar10-resnet32 --against baseline,captured")
    assert {"date", "cpu", "threads", "torch", "pcl_fast", "commit"} <= report.keys()
    check_method(report["pcl"])
    pcl = report["pcl"]
    assert (pcl["batch_size"], pcl["views"], pcl["steps_per_epoch"], pcl["device"]) == (8, 3, 4, "cpu")
    assert "pcl: resnet8, batch 8 x 3 views, cpu: training, with its data" in said
    assert "captured was left out: cpu has no CUDA graphs" in said
    assert pcl["verdict"] in said
    assert pcl["headline"] in said
    assert said.count("baseline-amp: the same with autocast to bfloat16, channels-last") == 1
    with Image.open(chart) as image:
        assert image.format == "PNG"
        assert image.width > 800
    assert len(json.loads(trace.read_text())["traceEvents"]) > 100


def check_method(found: dict[str, Any]) -> None:
    """What is derived is what the samples say."""
    variants, batch = found["variants"], found["batch_size"]
    assert list(variants) == ["baseline", "captured", "eager", "baseline-amp"]
    captured = variants.pop("captured")
    assert captured["refused"] == "cpu has no CUDA graphs"
    assert captured["compute"] is captured["end_to_end"] is captured["epoch_seconds_projected"] is None
    assert found["reference"] == "baseline"
    reference = variants["baseline"]["end_to_end"]["seconds"]
    for variant in variants.values():
        assert variant["refused"] is None
        for part in ("compute", "data", "end_to_end"):
            timing = variant[part]
            assert len(timing["seconds"]) == 2
            rate = batch / statistics.median(timing["seconds"])
            assert timing["images_per_second"] == pytest.approx(rate)
            assert timing["views_per_second"] == pytest.approx(3 * rate)
        whole, alone = variant["end_to_end"], variant["compute"]["median_seconds"]
        ratios = [a / b for a, b in zip(reference, whole["seconds"], strict=True)]
        assert whole["ratio"] == pytest.approx(statistics.median(ratios))
        assert whole["ratio_spread"] == pytest.approx([min(ratios), max(ratios)])
        assert variant["epoch_seconds_projected"] == pytest.approx(4 * whole["median_seconds"])
        idle = max(0.0, 1 - alone / whole["median_seconds"])
        assert variant["idle_for_data"] == pytest.approx(idle, abs=1e-9)
        floor = found["floor"]
        assert variant["mfu"] == pytest.approx(floor["flops"] / alone / floor["ceilings"]["flops"])
        assert variant["share_of_fused_floor"] == pytest.approx(floor["seconds"]["fused"] / alone)
        assert variant["counts"]["launches"] > 100
        assert variant["memory_bytes"] > 1 << 20
        assert variant["warmup_seconds"] > 0


def test_a_comparison_measures_both_methods_and_draws_each(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On noise nothing is to be loaded: only computing is measured."""
    files = ("--profile.json", str(tmp_path / "out.json"), "--profile.chart", str(tmp_path / "speed.png"))
    words = ["profile", "demo", "--data.backend", "synthetic", "--profile.against=eager,baseline"]
    assert main([*words, *SMALL, *ONCE, *files]) == 0
    said, report = printed(capsys), json.loads((tmp_path / "out.json").read_text())
    assert "training, with its data" not in said
    for method, views in (("vanilla", 1), ("pcl", 3)):
        found = report[method]
        assert (found["views"], found["reference"], found["verdict"]) == (views, "eager", None)
        assert found["variants"]["baseline"]["end_to_end"] is None
        assert f"{method}: resnet8, batch 8 x {views} view" in said
        ratio = found["variants"]["baseline"]["compute"]["ratio"]
        assert math.isclose(
            ratio,
            found["variants"]["eager"]["compute"]["median_seconds"]
            / found["variants"]["baseline"]["compute"]["median_seconds"],
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "out.json",
        "speed-pcl.png",
        "speed-vanilla.png",
    ]


def test_mistakes_are_said_before_anything_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["profile", "demo", *SMALL, "--against", "baseline,captued"]
    assert main(words) == ConfigError.exit_code
    streams = capsys.readouterr()
    assert streams.out == ""
    assert "unknown variant 'captued'. Did you mean 'captured'?" in " ".join(streams.err.split())
    assert main(["profile", "demo", "--steps", "0"]) == ConfigError.exit_code
    assert "--profile.steps 0: give at least 1" in " ".join(capsys.readouterr().err.split())


def test_nothing_that_can_be_measured_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["profile", "demo", *SMALL, *ONCE, "--data.backend", "synthetic", "--against", "captured"]
    assert main(words) == ConfigError.exit_code
    assert "none can be measured here (cpu has no CUDA graphs)" in " ".join(capsys.readouterr().err.split())


def test_data_that_are_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PCL_FAST_DATA", str(tmp_path))
    assert main(["profile", "cifar10-resnet32", *SMALL, *ONCE]) == DataError.exit_code
    assert "pcl-fast fetch cifar10" in " ".join(capsys.readouterr().err.split())


def test_what_is_measured_by_default() -> None:
    config = resolve(find_preset("cifar10-resnet32").config)

    def names(**changes: Any) -> list[str]:
        return ProfileOptions().names(dataclasses.replace(config, **changes))

    baselines = ["baseline", "baseline-amp"]
    assert names(capture="off") == [*baselines, "eager"]
    assert names(capture="on") == [*baselines, "eager", "captured"]
    assert names(capture="on", compile=True) == [*baselines, "compiled", "captured-compiled"]
    assert ProfileOptions(against="eager, baseline,eager").names(config) == ["eager", "baseline"]


def test_the_machine_and_the_commit() -> None:
    found = machine()
    assert found["threads"].isdecimal()
    if (REPOSITORY / ".git").exists():
        assert 7 <= len(found["commit"].removesuffix("+")) <= 40
        assert commit() == found["commit"]
