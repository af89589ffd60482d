"""Which runs a table is made of."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pcl_fast.config import Config
from pcl_fast.errors import ConfigError, did_you_mean
from pcl_fast.paper import TABLES
from pcl_fast.presets import find_preset, shortened

Budget = Literal["full", "quick", "cpu"]
TableName = Literal["cifar10", "cifar100", "imagenet", "ablation"]

METHODS = ("vanilla", "kd", "dml", "cl", "one", "okddip", "ffl", "kdcl", "pcl")
CPU_MODEL, CPU_EPOCHS, CPU_IMAGES, CPU_EVAL_EVERY = "resnet8", 40, 5_000, 8

# PCL with one thing changed, as the paper's ablation and what it leaves open have it.
ABLATIONS: dict[str, dict[str, Any]] = {
    "pcl": {},
    "no-ensemble-teacher": {"ensemble_teacher": False},
    "no-mean-teacher": {"mean_teacher": False},
    "no-teachers": {"ensemble_teacher": False, "mean_teacher": False},
    "mutual-learning": {"mutual_learning": True},
    "one-view": {"view_per_peer": False},
    "joint-bn": {"bn_views": "joint"},
    "ema-bn-copy": {"ema_bn": "copy"},
    "ema-bn-ema": {"ema_bn": "ema"},
}


@dataclass(frozen=True, slots=True)
class Matrix:
    """What a table is to be made of; without `rows` or `variants`, of all that it has."""

    table: TableName
    rows: Sequence[str]
    variants: Sequence[str]
    seeds: Sequence[int]
    budget: Budget


@dataclass(frozen=True, slots=True)
class Planned:
    """A run of a table: its row (a network), the method or ablation, and where it is."""

    row: str
    variant: str
    config: Config
    folder: Path


def plan_runs(matrix: Matrix, root: Path) -> list[Planned]:
    """All runs of a table in folders of `root`, everything with a seed before the next.

    ConfigError for a row or a method that the table does not have.
    """
    known = ("vanilla", *ABLATIONS) if matrix.table == "ablation" else METHODS
    rows = _known(matrix.rows, _rows(matrix), "--rows")
    variants = _known(matrix.variants, known, "--methods")
    return [
        _planned(matrix, row, variant, seed, root)
        for seed in matrix.seeds
        for row in rows
        for variant in variants
    ]


def _rows(matrix: Matrix) -> tuple[str, ...]:
    if matrix.budget == "cpu":
        if matrix.table == "imagenet":
            raise ConfigError("--budget cpu: not for imagenet; give cifar10 or cifar100")
        return (CPU_MODEL,)
    return ("resnet110",) if matrix.table == "ablation" else tuple(TABLES[matrix.table])


def _known(given: Sequence[str], known: Sequence[str], flag: str) -> Sequence[str]:
    for name in given:
        if name not in known:
            hint = did_you_mean(name, known) or f" There are: {', '.join(known)}."
            raise ConfigError(f"{flag} {name}: not in this table.{hint}")
    return [name for name in known if name in given] if given else known


def _planned(matrix: Matrix, row: str, variant: str, seed: int, root: Path) -> Planned:
    method = "pcl" if variant in ABLATIONS else variant
    config = dataclasses.replace(_recipe(matrix, row), method=method, seed=seed)
    if method == "kd":  # whose teacher is the network alone, of the same seed
        teacher = _folder(root, row, "vanilla", seed)
        config = dataclasses.replace(config, kd=dataclasses.replace(config.kd, teacher=teacher))
    pcl = dataclasses.replace(config.pcl, **ABLATIONS.get(variant, {}))
    return Planned(row, variant, dataclasses.replace(config, pcl=pcl), _folder(root, row, variant, seed))


def _recipe(matrix: Matrix, row: str) -> Config:
    """The paper's row, or what of it there is time for."""
    dataset = matrix.table
    if dataset == "ablation":  # on a CPU of CIFAR-10, as 5,000 images are too few of CIFAR-100
        dataset = "cifar10" if matrix.budget == "cpu" else "cifar100"
    if matrix.budget == "cpu":
        config = dataclasses.replace(find_preset(f"{dataset}-resnet32").config, model=row)
        config = shortened(config, CPU_EPOCHS, CPU_IMAGES)
        return dataclasses.replace(config, train=dataclasses.replace(config.train, eval_every=CPU_EVAL_EVERY))
    config = find_preset(f"{dataset}-{row}").config
    return config if matrix.budget == "full" else shortened(config, config.train.epochs // 5)


def _folder(root: Path, row: str, variant: str, seed: int) -> Path:
    return root / f"{row}-{variant}-seed{seed}"
