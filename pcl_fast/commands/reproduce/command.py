"""`pcl-fast reproduce TABLE`: run what is missing, resume what was cut, and write the table."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console

from pcl_fast.commands.data import fit_to_data
from pcl_fast.commands.flags import read_flags
from pcl_fast.commands.reproduce.planned import (
    CPU_EPOCHS,
    CPU_IMAGES,
    Budget,
    Matrix,
    Planned,
    TableName,
    plan_runs,
)
from pcl_fast.commands.reproduce.results import Line, as_table, lines_of, reached, write_files
from pcl_fast.commands.train import train
from pcl_fast.config import Config
from pcl_fast.device import resolve
from pcl_fast.errors import ConfigError, DivergedError, FolderInUse
from pcl_fast.run_folder import RunFolder

ABOUT = {
    "full": "the paper's schedule",
    "quick": "a fifth of the paper's epochs",
    "cpu": f"ResNet-8, {CPU_IMAGES:,} images, {CPU_EPOCHS} epochs",
}


@dataclass(frozen=True, kw_only=True)
class ReproduceOptions:
    """A table of the paper: every method, network and seed, its mean and spread beside what was reported."""

    table: tyro.conf.Positional[TableName]
    """Which table"""
    rows: str = ""
    """Networks, as resnet32,vgg16; by default all of the table."""
    methods: str = ""
    """Methods, as vanilla,dml,pcl (of the ablation, as pcl,no-mean-teacher); by default all."""
    seeds: str = "0,1,2"
    """A run for each of these seeds."""
    budget: Budget = "full"
    """full: the paper's schedule. quick: a fifth of its epochs. cpu: ResNet-8, 5,000 images, on two cores."""
    out: Path | None = None
    """Where all runs and tables are kept; by default runs/reproduce/TABLE-BUDGET."""
    train: Path | None = None
    """ImageNet's training images."""
    val: Path | None = None
    """ImageNet's validation images."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    show: bool = False
    """Only show what there is, and what is missing."""


def main(words: Sequence[str]) -> None:
    """Train every run that is not finished, and write the table after each.

    A run that another process trains is left to it: several processes may share a table. One that diverges
    is named at the end.
    """
    options = read_flags(ReproduceOptions, words, "pcl-fast reproduce")
    root = options.out or Path("runs") / "reproduce" / f"{options.table}-{options.budget}"
    seeds = [_number(word) for word in _words(options.seeds)]
    matrix = Matrix(options.table, _words(options.rows), _words(options.methods), seeds, options.budget)
    runs = plan_runs(matrix, root)
    console = Console()
    missing = [run for run in runs if reached(run) is None]
    about = ABOUT[options.budget]
    console.print(f"{options.table}, {about}: {len(runs)} runs, {len(missing)} to train", soft_wrap=True)
    told = [] if options.show else _train_all(missing, options, lambda: _write(options, runs, root), console)
    lines = _write(options, runs, root)
    if lines:
        console.print(as_table(_title(options), lines))
        console.print(f"{root}/table.md, table.csv, table.json", highlight=False, soft_wrap=True)
    for line in told:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _train_all(
    runs: Sequence[Planned], options: ReproduceOptions, after: Callable[[], object], console: Console
) -> list[str]:
    """Train runs, one after the other; what became of those that did not end well, in words."""
    told: list[str] = []
    for run in runs:
        config = _resolved(run.config, options)
        teacher = config.kd.teacher if config.method == "kd" else None
        if reached(run) is not None or (teacher is not None and not RunFolder(teacher).model.exists()):
            continue  # done by another process since, or its teacher is not
        try:
            train([(config, run.folder)], console)
            after()
        except FolderInUse:
            continue
        except DivergedError as error:
            told.append(f"{run.folder}: {error}")
    others = [run.folder.name for run in runs if reached(run) is None and not _failed(run, told)]
    if others:
        listed = ", ".join(others)
        told.append(f"not finished: {listed}: another process trains them or their teacher; run it again")
    return told


def _failed(run: Planned, told: Sequence[str]) -> bool:
    return any(line.startswith(f"{run.folder}: ") for line in told)


def _resolved(config: Config, options: ReproduceOptions) -> Config:
    data = dataclasses.replace(config.data, train=options.train, val=options.val)
    # One process a run: several that torchrun has started share the table, each on its own GPU.
    return fit_to_data(resolve(dataclasses.replace(config, data=data, device=options.device, ranks=1)))


def _write(options: ReproduceOptions, runs: Sequence[Planned], root: Path) -> list[Line]:
    lines = lines_of(options.table, runs, comparable=options.budget == "full")
    if lines:
        write_files(root, _title(options), lines)
    return lines


def _title(options: ReproduceOptions) -> str:
    return f"{options.table}: test top-1 (%) after the last epoch, {ABOUT[options.budget]}"


def _words(listed: str) -> list[str]:
    return [word for word in listed.replace(" ", ",").split(",") if word]


def _number(word: str) -> int:
    if not word.isdecimal():
        raise ConfigError(f"--seeds {word}: not a number; give seeds as 0,1,2")
    return int(word)
