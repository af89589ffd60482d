"""`pcl-fast train PRESET --seeds 0,1`: a run for each seed at the same time, and what they reach together."""

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pcl_fast import cli
from pcl_fast.commands.settings import choose
from pcl_fast.commands.train import _groups
from pcl_fast.sinks import read_records
from tests.tiny import assert_bitwise_equal, newest_checkpoint, read_model, timeless

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("small_cifar")]

NAME = "cifar10-resnet32"
FLAGS = ["--model", "resnet8", "--pcl.num-peers", "2", "--device", "cpu", "--amp.dtype", "float32"]
FLAGS += ["--data.subset", "32", "--train.batch-size", "16"]
STEPS = 4
HEADS = {"PCL": "mean_teacher1", "PCL-E": "mean_ensemble"}


def command(*words: str, epochs: int = 2, preset: str = NAME) -> list[str]:
    return ["train", preset, *FLAGS, "--train.epochs", str(epochs), *words]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder; returns where its runs will be."""
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    return tmp_path / "runs"


def top1(run: Path, head: str) -> float:
    return read_records(run / "metrics.jsonl")[-1]["val"][head]["top1"]


def kept(run: Path) -> dict[str, object]:
    """The files of a run that training it again would change; checkpoints are not even written anew."""
    found: dict[str, object] = {path.name: path.stat().st_mtime_ns for path in run.rglob("*.pt")}
    return found | {name: (run / name).read_bytes() for name in ("metrics.jsonl", "model.safetensors")}


def assert_same(one: Path, other: Path) -> None:
    checkpoints = [newest_checkpoint(path) for path in (one, other)]
    for content in checkpoints:
        for rank in content["ranks"]:
            del rank["rng"]  # torch's generator is one for all
    assert_bitwise_equal(*checkpoints)
    left, right = (timeless(read_records(path / "metrics.jsonl")) for path in (one, other))
    assert left == right
    assert_bitwise_equal(*(read_model(path / "model.safetensors") for path in (one, other)))


def test_two_seeds_their_folders_their_summary_and_later_commands(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(command("--seeds", "0,1")) == 0
    shown = capsys.readouterr().out
    runs = [here / f"{NAME}-seed{seed}" for seed in (0, 1)]
    summary = here / f"{NAME}-seeds-0-1"
    assert sorted(here.iterdir()) == sorted([*runs, summary])
    assert sorted(path.name for path in summary.iterdir()) == ["comparison.json", "curves.png"]
    reached = json.loads((summary / "comparison.json").read_text())
    assert list(reached) == list(HEADS)
    for name, head in HEADS.items():
        values = [top1(run, head) for run in runs]
        assert reached[name]["top1"] == values
        assert reached[name]["mean"] == pytest.approx(np.mean(values))
        assert reached[name]["std"] == pytest.approx(np.std(values, ddof=1))
        row = next(line for line in shown.splitlines() if f"│ {name} " in line)
        figures = [f"{np.mean(values):.2f}", f"{np.std(values, ddof=1):.2f}", *(f"{v:.2f}" for v in values)]
        assert [word for word in row.split() if word[0].isdigit()] == figures
    for seed in (0, 1):
        assert f"pcl seed {seed}: 2 epochs of 2 steps" in shown
        assert f"runs/{NAME}-seed{seed}/model.safetensors" in shown

    # Alone, a seed is the same run, in the same folder: it is done.
    before = kept(runs[1])
    assert cli.main(command("--seed", "1")) == 0
    assert f"resuming after step {STEPS} of {STEPS}" in capsys.readouterr().out
    assert cli.main(command("--seed", "1", "--run-dir", "alone")) == 0
    assert_same(here.parent / "alone", runs[1])

    # With another one beside it, only that is trained.
    assert cli.main(command("--seeds", "1", "2")) == 0
    assert kept(runs[1]) == before
    reached = json.loads((here / f"{NAME}-seeds-1-2" / "comparison.json").read_text())
    assert reached["PCL"]["top1"] == [top1(here / f"{NAME}-seed{seed}", "mean_teacher1") for seed in (1, 2)]
    assert newest_checkpoint(here / f"{NAME}-seed2")["progress"]["steps_done"] == STEPS


@pytest.mark.parametrize(
    "words", [["--seeds", "0,5"], ["--seeds", "0", "5"], ["--seeds=0,5"], ["--seeds=0", "5"]], ids=" ".join
)
def test_seeds_with_commas_spaces_or_an_equals_sign(words: list[str]) -> None:
    chosen = choose("train", command(*words, "--optim.lr", "0.2")[1:])
    assert [config.seed for config, _ in chosen.runs] == [0, 5]
    assert [config.seeds for config, _ in chosen.runs] == [(), ()]
    assert [config.optim.lr for config, _ in chosen.runs] == [0.2, 0.2]
    assert [path for _, path in chosen.runs] == [Path("runs") / f"{NAME}-seed{seed}" for seed in (0, 5)]
    assert chosen.folder == Path("runs") / f"{NAME}-seeds-0-5"
    assert [len(runs) for runs in _groups(chosen)] == [2]


def test_a_folder_given_for_all_holds_one_for_each() -> None:
    chosen = choose("train", command("--seeds", "3,4", "--run-dir", "my/runs")[1:])
    assert [path for _, path in chosen.runs] == [Path("my/runs/seed3"), Path("my/runs/seed4")]
    assert chosen.folder == Path("my/runs")


def test_methods_of_a_comparison_train_one_after_the_other_each_with_all_seeds() -> None:
    chosen = choose("train", command("--seeds", "3,4", preset="demo")[1:])
    grouped = [[(config.method, config.seed, path.name) for config, path in runs] for runs in _groups(chosen)]
    expected = [[(method, seed, f"{method}-seed{seed}") for seed in (3, 4)] for method in ("vanilla", "pcl")]
    assert grouped == expected
    alone = choose("train", command(preset="gain")[1:])
    assert [len(runs) for runs in _groups(alone)] == [1] * 6


def test_one_seed_of_a_list_is_a_run_alone(here: Path) -> None:
    chosen = choose("train", command("--seeds", "7")[1:])
    assert not chosen.side_by_side
    ((config, path),) = chosen.runs
    assert (config.seed, path) == (7, Path("runs") / f"{NAME}-seed7")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--seeds", "1,2,1"], "--seeds 1,2,1: give each seed once"),
        (["--seeds", "0,-1"], "--seeds -1: give 0 to 4294967295"),
        (["--seeds", "0,4294967296"], "--seeds 4294967296: give 0 to 4294967295"),
        (["--seeds", "0,one"], "one"),
    ],
    ids=str,
)
def test_seeds_that_cannot_be_are_refused(
    here: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    try:
        code: Any = cli.main(command(*words))
    except SystemExit as exit_:
        code = exit_.code
    assert code == 2
    captured = capsys.readouterr()
    assert said in captured.out + captured.err
    assert not here.exists()


def test_a_signal_saves_all_and_the_printed_command_finishes_all(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rarely = ["--train.log-every", "1", "--train.eval-every", "12", "--train.save-every", "12"]
    words = command("--seeds", "0,1", *rarely, epochs=5)
    records = here / f"{NAME}-seed1" / "metrics.jsonl"

    def stop_after_a_step() -> None:
        deadline = time.monotonic() + 60
        while not read_records(records) and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    watcher = threading.Thread(target=stop_after_a_step)
    watcher.start()
    code = cli.main(words)
    watcher.join()
    assert code == 75
    err = capsys.readouterr().err
    assert "stopped by SIGTERM after step " in err
    assert f"to go on:  pcl-fast train {NAME} " in err.replace("python -m pcl_fast", "pcl-fast")
    assert "--seeds 0,1" in err
    done = [newest_checkpoint(here / f"{NAME}-seed{seed}")["progress"]["steps_done"] for seed in (0, 1)]
    assert all(1 <= steps < 10 for steps in done)
    assert abs(done[0] - done[1]) <= 1
    assert not (here / f"{NAME}-seeds-0-1").exists()

    assert cli.main(words) == 0
    for seed, steps in enumerate(done):
        run = here / f"{NAME}-seed{seed}"
        records = run / "metrics.jsonl"
        assert [r["step"] for r in read_records(records) if r["kind"] == "step"] == [*range(1, 11)]
        assert newest_checkpoint(run)["progress"]["steps_done"] == 10 > steps
    assert (here / f"{NAME}-seeds-0-1" / "comparison.json").exists()


def test_seeds_that_diverge_end_with_code_4(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(command("--seeds", "0,1", "--optim.lr", "1e30")) == 4
    captured = capsys.readouterr()
    assert "error: step " in captured.err
    assert "not finite: " in captured.err
    assert captured.out.count("this run ends here, the others go on") == 2
    assert not (here / f"{NAME}-seeds-0-1").exists()


def test_a_folder_that_cannot_be_used_stops_all_before_anything_is_trained(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the folders that were claimed before it are free again."""
    blocked = here / f"{NAME}-seed1"
    blocked.mkdir(parents=True)
    (blocked / "config.json").write_text("{")
    assert cli.main(command("--seeds", "0,1")) == 2
    assert str(blocked.relative_to(here.parent)) in capsys.readouterr().err
    assert not (here / f"{NAME}-seed0" / "metrics.jsonl").exists()
    (blocked / "config.json").unlink()
    assert cli.main(command("--seeds", "0,1")) == 0
