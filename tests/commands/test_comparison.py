"""`pcl-fast train demo`, whole but tiny: two runs, a table, a plot, deployable networks, `evaluate`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from pcl_fast import cli
from pcl_fast.models.zoo import find_backbone
from pcl_fast.sinks import read_records
from tests.commands.conftest import Process
from tests.commands.small_cifar import TEST_IMAGES, read_test_file

COMMAND = [
    "train",
    "demo",
    "--model",
    "resnet8",
    "--data.subset",
    "64",
    "--train.batch-size",
    "16",
    "--train.epochs",
    "2",
    "--pcl.num-peers",
    "2",
    "--device",
    "cpu",
    "--amp.dtype",
    "float32",
]
PCL_HEADS = ["peer1", "peer2", "ensemble", "mean_teacher1", "mean_teacher2", "mean_ensemble"]


pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("comparison")


@pytest.fixture(scope="module")
def trained(folder: Path, pcl_fast: Callable[..., Process]) -> str:
    """The comparison is in `folder / "runs"`; what it printed."""
    with pcl_fast(*COMMAND, cwd=folder) as child:
        out, err = child.communicate(timeout=110)
    assert (child.returncode, err) == (0, "")
    return out


@pytest.fixture
def here(folder: Path, trained: str, small_cifar: None, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder of the comparison, for commands within this process."""
    monkeypatch.chdir(folder)
    torch.set_num_threads(1)  # sums in the order of the other process
    return folder / "runs" / "demo"


def last_evaluation(run: Path) -> dict[str, Any]:
    return read_records(run / "metrics.jsonl")[-1]["val"]


def test_both_runs_and_their_results_are_there(here: Path, trained: str) -> None:
    assert sorted(path.name for path in here.iterdir()) == [
        "comparison.json",
        "curves.png",
        "pcl-seed0",
        "vanilla-seed0",
    ]
    for run in ("pcl-seed0", "vanilla-seed0"):
        assert {path.name for path in (here / run).iterdir()} >= {
            "checkpoints",
            "config.json",
            "curves.png",
            "metrics.jsonl",
            "model.safetensors",
        }
    pcl, vanilla = last_evaluation(here / "pcl-seed0"), last_evaluation(here / "vanilla-seed0")
    assert list(pcl) == PCL_HEADS
    assert list(vanilla) == ["peer1"]
    assert {head["images"] for head in (*pcl.values(), *vanilla.values())} == {TEST_IMAGES}
    reached = {"vanilla": vanilla["peer1"], "PCL": pcl["mean_teacher1"], "PCL-E": pcl["mean_ensemble"]}
    assert json.loads((here / "comparison.json").read_text()) == {
        name: {"top1": [head["top1"]], "mean": head["top1"], "std": None} for name, head in reached.items()
    }
    assert "vanilla seed 0: 2 epochs of 4 steps" in trained
    for name, head in reached.items():
        row = next(line for line in trained.splitlines() if f"│ {name} " in line)
        assert f"{head['top1']:.2f}" in row
    assert "runs/demo/pcl-seed0/model.safetensors" in trained


def test_the_plot_has_both_runs(here: Path) -> None:
    with Image.open(here / "curves.png") as image:
        assert image.format == "PNG"
        assert image.size == (1320, 504)
        colours = np.ptp(np.asarray(image.convert("RGB")).astype(int), axis=-1) > 40
    assert colours[:, :660].sum() > 200
    assert colours[:, 660:].sum() > 200


def test_the_same_command_again_trains_nothing_and_prints_the_same_results(
    here: Path, trained: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def state() -> dict[Path, bytes]:
        kept = ("*.pt", "metrics.jsonl", "model.safetensors", "comparison.json", "config.json")
        return {path: path.read_bytes() for pattern in kept for path in here.rglob(pattern)}

    before = state()
    assert len(before) == 9, "two checkpoints a method would be eleven: the demo saves every other epoch"
    assert cli.main(COMMAND) == 0
    assert state() == before
    shown = capsys.readouterr().out
    assert "resuming after step 8 of 8" in shown
    table = trained[trained.index("test top-1") :].splitlines()
    assert [line.rstrip() for line in shown[shown.index("test top-1") :].splitlines()] == [
        line.rstrip() for line in table
    ]


def test_evaluate_finds_what_training_recorded(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every head and every pair of heads of every run of the comparison, to the last digit."""
    assert cli.main(["evaluate", "runs/demo", "--device", "cpu", "--json", "figures.json"]) == 0
    figures = json.loads(Path("figures.json").read_text())
    pairs = figures["runs/demo/pcl-seed0"].pop("between")
    assert pairs == read_records(here / "pcl-seed0" / "metrics.jsonl")[-1]["between"]
    assert pairs["heads"] == list(last_evaluation(here / "pcl-seed0"))
    assert figures == {
        f"runs/demo/{run}": last_evaluation(here / run) for run in ("pcl-seed0", "vanilla-seed0")
    }
    shown = capsys.readouterr().out
    for line in ("mean teacher1 = PCL", "mean ensemble = PCL-E", "peer1 = vanilla", f"{TEST_IMAGES} images"):
        assert line in shown
    for head in last_evaluation(here / "pcl-seed0").values():
        assert f"{head['top1']:.2f}" in shown
        assert f"{head['ece']:.2f}" in shown


@pytest.mark.parametrize(("run", "head"), [("pcl-seed0", "mean_teacher1"), ("vanilla-seed0", "peer1")])
def test_the_deployed_network_needs_nothing_of_ours_and_reaches_what_is_reported(
    here: Path, cifar_folder: Path, run: str, head: str
) -> None:
    network = find_backbone("resnet8").build(10)
    network.load_state_dict(load_file(here / run / "model.safetensors"), strict=True)
    network.eval()
    pixels, labels = read_test_file(cifar_folder)
    mean = torch.tensor([0.4914, 0.4822, 0.4465])[:, None, None]
    std = torch.tensor([0.2470, 0.2435, 0.2616])[:, None, None]
    with torch.no_grad():
        logits = network((torch.from_numpy(pixels).float() / 255 - mean) / std)
    targets = torch.from_numpy(labels).long()
    reported = last_evaluation(here / run)[head]
    assert 100 * (logits.argmax(-1) == targets).double().mean().item() == pytest.approx(reported["top1"])
    loss = torch.nn.functional.cross_entropy(logits, targets).item()
    assert loss == pytest.approx(reported["loss"], rel=1e-4)


def test_a_comparison_does_not_mix_settings(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*COMMAND, "--optim.lr", "0.3"]) == 2
    err = capsys.readouterr().err
    assert "vanilla-seed0: holds a run with other settings" in err
    assert "optim.lr: 0.1 -> 0.3" in err
