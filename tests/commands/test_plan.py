"""`pcl-fast plan PRESET`, as a user calls it: what it prints, what it writes, what it refuses."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import pytest

from pcl_fast.beton import open_beton
from pcl_fast.cli import main
from pcl_fast.commands.plan import PlanOptions
from pcl_fast.commands.profile.preset_report import Findings, report_of
from pcl_fast.config import Config
from pcl_fast.device import resolve
from pcl_fast.errors import ConfigError, DataError
from pcl_fast.presets import find_preset
from pcl_fast.profile.ceilings import KNOWN
from pcl_fast.profile.comparison import Plan, Row
from pcl_fast.profile.plan.basis import Kind
from pcl_fast.profile.plan.step_time import read_step
from pcl_fast.profile.roofline import step_floor, step_work
from pcl_fast.profile.timing import Timing
from tests.conftest import REPOSITORY
from tests.datasets_prep.pictures import convert_folder, write_folder

LOADERS = REPOSITORY / "docs" / "measurements" / "loaders.json"
KINDS = Kind.__args__
PRESET, SMALL = "imagenet-r18", "cifar10-resnet32"


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal in which no line breaks."""
    monkeypatch.setenv("COLUMNS", "250")


@pytest.fixture
def planned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Plan, and return what was printed and what was written."""

    def plan(*words: str) -> tuple[str, dict[str, Any]]:
        out = tmp_path / "plan.json"
        assert main(["plan", *words, "--json", str(out)]) == 0
        printed = capsys.readouterr()
        assert printed.err == ""
        return printed.out, json.loads(out.read_text())

    return plan


def error_of(words: list[str], capsys: pytest.CaptureFixture[str], code: int = ConfigError.exit_code) -> str:
    """The one line that a plan ends with."""
    assert main(["plan", *words]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("pcl-fast: error: ")
    assert err.count("\n") == 1
    return err


def rows(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["what"]: row for row in report["rows"]}


def on_gpu(preset: str = PRESET, **changes: Any) -> Config:
    config = resolve(dataclasses.replace(find_preset(preset).config, device="cpu"))
    config = dataclasses.replace(config, amp=dataclasses.replace(config.amp, dtype="bfloat16"))
    return dataclasses.replace(config, device="cuda", **changes)


work_of = functools.cache(step_work)


def write_step(
    path: Path, config: Config, gpu: str = "NVIDIA H200", variants: str = "baseline,captured"
) -> Path:
    """What `pcl-fast profile PRESET --json` writes, but for the timings: 50 ms, and 40 ms of the second."""
    found = [
        Row(
            name=name,
            about="",
            batch_size=config.train.batch_size,
            memory=30 * 10**9,
            compute=Timing([seconds, 2 * seconds, seconds], 1, 1.0, (1.0, 1.0)),
        )
        for name, seconds in zip(variants.split(","), (0.05, 0.04, 0.045), strict=False)
    ]
    floor = step_floor(work_of(config), KNOWN["NVIDIA H200"])
    plan = Plan(repeats=3, steps=1, warmup=1)
    findings = Findings(config=config, rows=found, floor=floor, steps_per_epoch=5004, plan=plan)
    head = {"date": "2026-11-24T12:00:00+00:00", "gpu": gpu}
    path.write_text(json.dumps({**head, config.method: report_of(findings)}))
    return path


def test_with_nothing_measured_everything_says_so(planned: Any) -> None:
    out, report = planned(PRESET, "--gpus", "8", "--cores", "96")
    pcl = report["pcl"]
    assert report["command"].startswith("pcl-fast plan imagenet-r18 --gpus 8 --cores 96")
    assert (pcl["ranks"], pcl["global_batch"], pcl["steps_per_epoch"]) == (8, 2048, 625)
    assert {row["basis"]["kind"] for row in pcl["rows"]} == {"given", "computed", "projected"}
    assert rows(pcl)["computing"]["basis"]["kind"] == "projected"
    assert rows(pcl)["a core prepares"]["basis"]["source"].count("docs/measurements.md") == 1
    lines = [line for line in out.splitlines() if line]
    assert lines[-1] == pcl["sentence"]
    assert lines[-1].startswith("imagenet-r18 on 8 H200s: computing binds; expect ")
    assert lines[-1].endswith("for all 90, evaluation included (projected).")
    for row in pcl["rows"]:
        shown = next(line for line in lines if row["value"] in line and row["what"] in line)
        assert row["basis"]["kind"] in shown
        assert row["basis"]["source"] in shown
        assert row["basis"]["kind"] in KINDS
    for line in pcl["models"]:
        assert line in lines


def test_what_was_measured_is_taken(tmp_path: Path, planned: Any) -> None:
    step = write_step(tmp_path / "step.json", on_gpu(), variants="baseline,captured,eager")
    words = ["--gpus", "8", "--cores", "120", "--step", str(step), "--loaders", str(LOADERS)]
    _, report = planned(PRESET, *words)
    pcl = report["pcl"]
    assert pcl["compute_seconds"] == 0.04
    computing, core = rows(pcl)["computing"]["basis"], rows(pcl)["a core prepares"]["basis"]
    assert computing["kind"] == core["kind"] == "measured"
    assert computing["source"] == "step.json: captured on one NVIDIA H200, computing alone, 2026-11-24"
    assert core["source"].startswith("loaders.json: ffcv-host")
    assert rows(pcl)["of a step"]["basis"]["kind"] == "measured"
    for what in ("all-reduce", "epoch", "run", "evaluation", "a node can feed", "cores needed"):
        assert rows(pcl)[what]["basis"]["kind"] == "projected"
    bytes_ = 4 * work_of(on_gpu()).parameters + pcl["exchange"]["statistics"]
    moving = 2 * 7 / 8 * bytes_ / (0.8 * 450e9) + 2 * 2 * 7 * 2e-6
    assert pcl["allreduce_seconds"] == pytest.approx(moving)
    assert pcl["epoch_seconds"] == pytest.approx(625 * (0.04 + moving))
    assert pcl["run_seconds"] == pytest.approx(90 * (pcl["epoch_seconds"] + pcl["evaluation_seconds"]))
    assert pcl["sentence"].endswith("(projected from a step and loaders as measured).")


def test_a_step_of_profile_gpu(tmp_path: Path, planned: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Its file holds steps of many networks, and of PCL their FLOPs."""

    def step(mode: str, seconds: float, **changes: Any) -> dict[str, Any]:
        row = {"what": "step", "mode": mode, "model": "resnet32", "batch": 128, "method": "pcl"}
        return row | {"augmented": False, "seconds": [seconds] * 3, "peak_bytes": 10**10} | changes

    flops = work_of(on_gpu(SMALL)).flops
    floor = {"what": "floor", "model": "resnet32", "batch": 128, "method": "pcl", "flops": flops}
    failed = {"what": "step", "mode": "captured", "model": "resnet32", "batch": 128, "method": "pcl"}
    steps = [
        step("eager", 0.05),
        step("captured", 0.04),
        step("baseline", 0.01),
        step("captured", 0.02, augmented=True),
        step("captured", 0.03, batch=64),
        failed | {"augmented": False, "failed": "no memory"},
    ]
    alone = step("captured", 0.012, method="vanilla")
    parts = {
        "device": {"date": "2026-11-23T10:00:00", "rows": [{"what": "machine", "gpu": "NVIDIA H200"}]},
        "imagenet": {"date": "2026-11-24T10:00:00", "rows": [floor, *steps, alone]},
    }
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps({"parts": parts}))
    _, report = planned(SMALL, "--step", str(path))
    assert report["pcl"]["compute_seconds"] == 0.04
    source = rows(report["pcl"])["computing"]["basis"]["source"]
    assert source == "gpu.json: captured on one NVIDIA H200, computing alone, 2026-11-24"
    _, report = planned(f"{SMALL}-vanilla", "--step", str(path))
    assert report["vanilla"]["compute_seconds"] == 0.012
    assert report["vanilla"]["sentence"].endswith("(projected from a step as measured).")
    said = error_of([SMALL, "--step", str(path), "--train.batch-size", "256"], capsys)
    assert "gpu.json: holds resnet32 @128, resnet32 @64; this run has resnet32 @256, pcl" in said
    said = error_of([SMALL, "--step", str(path), "--pcl.num-peers", "2"], capsys)
    assert "GFLOP a step, this run has" in said
    said = error_of([SMALL, "--step", str(path), "--amp.dtype", "float32"], capsys)
    assert "measured in bfloat16, this run has float32" in said


def test_settings_of_training_count(planned: Any) -> None:
    words = ["--nodes", "2", "--gpus", "4", "--gpu", "a100", "--network", "25"]
    changes = ["--train.batch-size", "64", "--train.epochs", "16", "--dist.reduce-dtype", "bfloat16"]
    changes += ["--optim.lr-batch", "256", "--optim.lr", "0.1", "--device", "cuda", "--capture", "on"]
    out, report = planned(PRESET, *words, *changes)
    pcl, parameters = report["pcl"], work_of(on_gpu()).parameters
    assert pcl["gpu"] == "a100"
    assert pcl["global_batch"] == 512
    assert pcl["learning_rate"] == pytest.approx(0.2)
    assert pcl["exchange"]["gradients"] == 2 * parameters
    assert rows(pcl)["between nodes"]["value"] == "25 GB/s for each GPU, 100 GB/s a node"
    assert "on 8 A100s in 2 nodes" in out
    assert "for all 16, evaluation included" in out


def test_smaller_views_take_less(planned: Any) -> None:
    """Views grow over the first half; computing goes with the pixels, about."""
    words = ["--train.epochs", "8", "--gpus", "1", "--cores", "60"]
    full = planned(PRESET, *words)[1]["pcl"]
    out, report = planned(PRESET, *words, "--data.resize-from", "128", "--data.resize-until", "0.5")
    assert "progressive resizing" in out
    pcl = report["pcl"]
    assert pcl["epoch_seconds"] == full["epoch_seconds"]
    first, last = pcl["seconds_of_epochs"][0], pcl["seconds_of_epochs"][-1]
    assert last == full["epoch_seconds"]
    assert first == pytest.approx((128 / 224) ** 2 * last, rel=0.1)
    assert pcl["seconds_of_epochs"] == sorted(pcl["seconds_of_epochs"])
    assert full["run_seconds"] - pcl["run_seconds"] == pytest.approx(8 * last - sum(pcl["seconds_of_epochs"]))


def test_precision_is_a_gpu_s_unless_given(planned: Any) -> None:
    narrow, wide = (planned(SMALL, *words)[1]["pcl"] for words in ((), ("--amp.dtype", "float32")))
    assert wide["compute_seconds"] > 1.5 * narrow["compute_seconds"]


def test_a_data_set_in_memory_needs_no_loader(planned: Any) -> None:
    out, report = planned("demo", "--gpus", "2", "--cores", "1")
    for method in ("vanilla", "pcl"):
        found = report[method]
        assert rows(found)["loading"]["value"] == "none: the data lie in the GPU's memory"
        assert found["images_per_second_of_a_core"] is None
        assert found["binds"] == "computing"
        assert f"demo ({method}) on 2 H200s" in out


def test_the_images_that_are_given(tmp_path: Path, planned: Any) -> None:
    folder = write_folder(tmp_path / "folder", images=30)
    train = tmp_path / "train.beton"
    convert_folder(folder, train)
    words = ["--data.train", str(train), "--data.val", str(train), "--train.batch-size", "4"]
    _, report = planned(PRESET, "--gpus", "2", *words)
    pcl = report["pcl"]
    assert pcl["steps_per_epoch"] == 30 // 8
    assert rows(pcl)["evaluation"]["value"].endswith("90 times, 30 images")
    stored = rows(pcl)["training file"]
    assert stored["basis"] == {"kind": "computed", "source": "the size of train.beton"}
    assert stored["value"] == f"{train.stat().st_size / 1e6:.3g} MB"


def test_real_photos_take_the_room_that_is_assumed(
    shared_data: Path, tmp_path: Path, planned: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """A tenth of the photos: within a fifth of the bytes an image that ImageNet's are projected from."""
    folder = tmp_path / "photos"
    photos = sorted((shared_data / "imagenet-mini" / "train").glob("*/*.JPEG"))[::10]
    for photo in photos:
        link = folder / photo.parent.name / photo.name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(photo)
    train = tmp_path / "train.beton"
    assert main(["convert", "imagefolder", str(folder), str(train), "--workers", "1"]) == 0
    capsys.readouterr()
    whole = planned(PRESET)[1]["pcl"]
    assert rows(whole)["training file"]["value"] == "157 GB"
    with open_beton(train) as opened:
        assert opened.lengths_N.mean() == pytest.approx(157e9 / 1_281_167, rel=0.2)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gpus", "0"], "--gpus 0: give at least 1"),
        (["--cores", "-3"], "--cores -3: give at least 1"),
        (["--nodes", "0"], "--nodes 0: give at least 1"),
        (["--network", "0"], "--network 0: give GB/s above 0, as 50"),
        (["--network", "nan"], "--network nan: give GB/s above 0, as 50"),
        (["--share", "73"], "--share 73: give a share of the floor above 0, up to 1, as 0.6"),
        (["--gpu", "h20"], "--gpu h20: no figures of such a GPU. Did you mean 'h200'?"),
        (["--ranks", "4"], "--ranks: a plan has one for each GPU; give --gpus (of a node) and --nodes"),
        (["--seeds", "1,2"], "--seeds: a plan is of one run; give --seed, or nothing"),
        (
            ["--step", "none.json"],
            "--step none.json cannot be read: No such file or directory; `pcl-fast profile",
        ),
        (["--loaders", "none.json"], "--loaders none.json cannot be read: No such file"),
        (["--loaders", str(LOADERS), "--pcl.num-peers", "5"], "measured with 1, 2, 3, 4 views of an image"),
        (
            ["--step", str(LOADERS)],
            "loaders.json: not such a file; `pcl-fast profile PRESET --json FILE` makes one",
        ),
        (["--train.batch-size", "400000"], "3,200,000 images a step are more than the 1,281,167 there are"),
    ],
)
def test_what_cannot_be_is_one_line(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in error_of([PRESET, *words], capsys)


def test_a_step_of_another_run_is_refused(tmp_path: Path) -> None:
    path, config = tmp_path / "step.json", on_gpu(SMALL)

    def refused(made: Config, said: str, variants: str = "baseline,captured") -> None:
        write_step(path, made, variants=variants)
        with pytest.raises(ConfigError, match=said):
            read_step(path, config, work_of(config))

    small = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=64))
    refused(small, "step.json: measured with batch size 64, this run has 128")
    other = dataclasses.replace(config, model="resnet8")
    refused(other, "measured with model resnet8, this run has resnet32")
    alone = dataclasses.replace(config, method="vanilla")
    refused(alone, "measured with method vanilla, this run has pcl")
    shrunk = dataclasses.replace(config, data=dataclasses.replace(config.data, image_size=16))
    refused(shrunk, "GFLOP a step, this run has 212: another image size")
    refused(dataclasses.replace(config, device="cpu"), "measured on cpu; measure on a GPU")
    refused(config, "none of ours was measured", variants="baseline")


def test_a_step_of_another_gpu_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "step.json"
    words = [SMALL, "--step", str(path)]
    write_step(path, on_gpu(SMALL))
    said = error_of([*words, "--gpu", "a100"], capsys)
    assert "--gpu a100: the step was measured on NVIDIA H200; give h200" in said
    write_step(path, on_gpu(SMALL), gpu="NVIDIA GeForce RTX 4090")
    assert "measured on NVIDIA GeForce RTX 4090; plans are for h200, h100, a100" in error_of(words, capsys)


@pytest.mark.parametrize("damage", ["floor", "variants", "device"])
def test_a_step_that_lacks_something(damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_step(tmp_path / "step.json", on_gpu(SMALL))
    report = json.loads(path.read_text())
    report["pcl"][damage] = None
    path.write_text(json.dumps(report))
    assert "step.json: not such a file" in error_of([SMALL, "--step", str(path)], capsys)


def test_data_that_are_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [PRESET, "--data.train", str(tmp_path / "none.beton")]
    assert "none.beton" in error_of(words, capsys, DataError.exit_code)


def test_without_a_preset_it_lists_them(capsys: pytest.CaptureFixture[str]) -> None:
    for words, code in ((["plan"], ConfigError.exit_code), (["plan", "--help"], 0)):
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == code
        assert "usage: pcl-fast plan PRESET" in capsys.readouterr().out


def test_a_misspelt_flag_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert "Did you mean '--gpus'?" in error_of([PRESET, "--gpuss", "8"], capsys)


def test_what_is_planned_by_default() -> None:
    options = PlanOptions()
    options.check()
    assert (options.gpus, options.nodes, options.cores, options.gpu) == (8, 1, 96, None)
