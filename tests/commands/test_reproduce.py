"""The paper's tables from one command, on a handful of images of random pixels."""

import csv
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from pcl_fast.cli import main
from pcl_fast.commands.reproduce import command, planned
from pcl_fast.commands.reproduce.planned import ABLATIONS, METHODS, Matrix, plan_runs
from pcl_fast.commands.reproduce.results import Line, lines_of, reached
from pcl_fast.errors import ConfigError
from pcl_fast.paper import COLUMNS, TABLES, Reported
from pcl_fast.run_folder import RunFolder

SEEDS = [0, 1]


def matrix(**changes: Any) -> Matrix:
    return dataclasses.replace(Matrix("cifar100", [], [], SEEDS, "full"), **changes)


def test_a_table_is_every_network_method_and_seed(tmp_path: Path) -> None:
    runs = plan_runs(matrix(), tmp_path)
    assert len(runs) == 5 * len(METHODS) * 2
    assert [run.config.seed for run in runs] == sorted(run.config.seed for run in runs), "seed by seed"
    assert len({run.folder for run in runs}) == len(runs)
    of_vgg = [run for run in runs if (run.row, run.variant) == ("vgg16", "dml")]
    assert [run.folder.name for run in of_vgg] == ["vgg16-dml-seed0", "vgg16-dml-seed1"]
    config = of_vgg[0].config
    assert (config.model, config.method, config.train.epochs) == ("vgg16", "dml", 300)
    for run in runs:
        if run.variant == "kd":
            teacher = run.folder.with_name(run.folder.name.replace("-kd-", "-vanilla-"))
            assert run.config.kd.teacher == teacher


def test_budgets_and_ablations(tmp_path: Path) -> None:
    (quick,) = plan_runs(matrix(rows=["resnet32"], variants=["pcl"], seeds=[3], budget="quick"), tmp_path)
    assert (quick.config.train.epochs, quick.config.seed, quick.config.data.subset) == (60, 3, None)
    (cpu,) = plan_runs(matrix(variants=["pcl"], seeds=[0], budget="cpu"), tmp_path)
    assert (cpu.row, cpu.config.model, cpu.config.data.subset) == ("resnet8", "resnet8", 5_000)
    runs = plan_runs(matrix(table="ablation", seeds=[0]), tmp_path)
    assert [run.variant for run in runs] == ["vanilla", *ABLATIONS]
    assert {(run.config.model, run.config.data.dataset) for run in runs} == {("resnet110", "cifar100")}
    small = plan_runs(matrix(table="ablation", seeds=[0], budget="cpu"), tmp_path)
    assert {(run.config.model, run.config.data.dataset) for run in small} == {("resnet8", "cifar10")}
    assert len({(run.config.method, run.config.pcl) for run in runs}) == len(runs), "each is something else"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": ["resnet33"]}, r"^--rows resnet33: not in this table. Did you mean 'resnet32'\?$"),
        ({"variants": ["dm"]}, r"^--methods dm: not in this table. Did you mean 'dml'\?$"),
        ({"table": "imagenet", "budget": "cpu"}, r"^--budget cpu: not for imagenet"),
    ],
)
def test_what_a_table_does_not_have(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_runs(matrix(**changes), tmp_path)


def test_the_papers_figures_are_complete() -> None:
    for table in ("cifar10", "cifar100"):
        assert len(TABLES[table]) == 5
        assert all(tuple(row) == COLUMNS for row in TABLES[table].values())
    assert TABLES["cifar100"]["resnet32"]["PCL"] == Reported(74.14, 0.16)
    assert TABLES["cifar10"]["wrn20-8"]["vanilla"] == Reported(94.68, certain=False)


def test_agreement_is_within_two_spreads() -> None:
    def line(*top1: float) -> Line:
        return Line("resnet32", "pcl", "PCL", top1, None, Reported(74.0, 0.3))

    assert line(74.5, 74.9, 74.7).agrees  # std 0.2: two spreads are 0.72
    assert line(74.5, 74.9, 74.7).std == pytest.approx(0.2)
    assert line(75.0, 74.8, 74.9).agrees is False
    assert line(74.0).agrees is None
    assert line(74.6).cells()[3:6] == ("74.60", "74.60", "")
    assert line(74.6).beside_paper() == ("74.00 +- 0.30", "+0.60", "")


@pytest.fixture
def tiny_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of a second in the place of the CPU's budget."""
    whole = planned._recipe

    def recipe(matrix: Matrix, row: str) -> Any:
        config = whole(matrix, row)
        data = dataclasses.replace(config.data, backend="synthetic", subset=32, image_size=16)
        train = dataclasses.replace(config.train, epochs=1, batch_size=16)
        amp = dataclasses.replace(config.amp, dtype="float32")
        return dataclasses.replace(config, data=data, train=train, amp=amp)

    monkeypatch.setattr(planned, "_recipe", recipe)


def run(root: Path, *words: str) -> int:
    given = ["cifar10", "--budget", "cpu", "--methods", "vanilla,pcl", "--seeds", "0,1"]
    return main(["reproduce", *given, "--out", str(root), *words])


@pytest.mark.usefixtures("tiny_recipe")
@pytest.mark.timeout(120)
def test_what_is_missing_is_trained_and_the_table_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, "--seeds", "0") == 0
    assert "2 runs, 2 to train" in capsys.readouterr().out
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/metrics.jsonl")}
    assert run(tmp_path) == 0
    assert "4 runs, 2 to train" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in before} == before, "what is done stays as it is"
    lines = json.loads((tmp_path / "table.json").read_text())["lines"]
    assert [line["result"] for line in lines] == ["vanilla", "PCL", "PCL-E"]
    assert all(len(line["top1"]) == 2 and line["paper"] is None for line in lines)
    with (tmp_path / "table.csv").open() as file:
        rows = list(csv.reader(file))
    assert rows[0][-1] == "over vanilla"
    assert len(rows) == 4
    runs = plan_runs(Matrix("cifar10", [], ["vanilla", "pcl"], [0, 1], "cpu"), tmp_path)
    mean = sum((reached(run) or {})["vanilla"] for run in runs if run.variant == "vanilla") / 2
    assert lines[0]["mean"] == pytest.approx(mean)
    assert f"{mean:.2f}" in (tmp_path / "table.md").read_text()
    assert run(tmp_path, "--show") == 0
    assert "4 runs, 0 to train" in capsys.readouterr().out


@pytest.mark.usefixtures("tiny_recipe")
def test_a_run_of_another_process_is_left_to_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And what it is to teach waits."""
    (first, *_) = plan_runs(Matrix("cifar10", [], ["vanilla"], [0], "cpu"), tmp_path)
    lock = RunFolder(first.folder).claim(command._resolved(first.config, options(tmp_path)))
    assert run(tmp_path, "--seeds", "0", "--methods", "vanilla,kd") == 0
    told = capsys.readouterr().out
    assert "not finished: resnet8-vanilla-seed0, resnet8-kd-seed0: another process trains them" in told
    lock.close()
    assert run(tmp_path, "--seeds", "0", "--methods", "vanilla,kd") == 0
    assert len(lines_of("cifar10", plan_runs(Matrix("cifar10", [], [], [0], "cpu"), tmp_path), True)) == 2


def test_processes_that_torchrun_has_started_train_a_run_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    (run,) = plan_runs(Matrix("cifar10", [], ["pcl"], [0], "cpu"), tmp_path)
    assert command._resolved(run.config, options(tmp_path)).ranks == 1


def options(root: Path) -> command.ReproduceOptions:
    return command.ReproduceOptions(table="cifar10", out=root)


def test_seeds_are_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "--seeds", "0,x") == 2
    assert "--seeds x: not a number; give seeds as 0,1,2" in capsys.readouterr().err
