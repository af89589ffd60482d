"""What a report knows of runs: each read from its folder, and those that differ in nothing but their seed."""

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pcl_fast.config import Config
from pcl_fast.config_file import flatten, to_dict
from pcl_fast.errors import ConfigError
from pcl_fast.objectives import METHODS, make_objective
from pcl_fast.run_folder import FREE_SETTINGS, RunFolder, runs_in
from pcl_fast.run_log import Entry, read_entries
from pcl_fast.sinks import Record, check_whole, evaluations, read_records

OF_EACH_RUN = frozenset({"run_dir", "resume", "seed", "seeds"})
SHORT_LABEL = 2  # settings that tell two groups of a method apart, at most, to be named


@dataclass(frozen=True, slots=True)
class FoundRun:
    """A run: its settings, its epochs' records, and the seconds that its processes took, if known.

    `headline` names its results and the heads that they are of.
    """

    path: Path
    config: Config
    headline: dict[str, str]
    epochs: list[Record]
    seconds: float | None

    @property
    def done(self) -> int:
        """Epochs that have ended."""
        return self.epochs[-1]["epoch"] + 1 if self.epochs else 0

    @property
    def finished(self) -> bool:
        """Whether it has reached its last epoch."""
        return self.done == self.config.train.epochs

    @property
    def last(self) -> Record | None:
        """The record of its last evaluation."""
        measured = evaluations(self.epochs)
        return measured[-1] if measured else None

    @property
    def flags(self) -> dict[str, Any]:
        """Every setting by its dotted name."""
        return flatten(to_dict(self.config))


@dataclass(frozen=True, slots=True)
class Group:
    """Runs that differ in nothing but their seed, ordered by it."""

    label: str
    runs: tuple[FoundRun, ...]

    @property
    def headline(self) -> dict[str, str]:
        """The names of their results, and the heads that they are of."""
        return self.runs[0].headline

    @property
    def method(self) -> str:
        """The method of them all."""
        return self.runs[0].config.method

    @property
    def counted(self) -> tuple[FoundRun, ...]:
        """The runs whose results count: the finished ones, or all that were evaluated if none is."""
        measured = tuple(run for run in self.runs if run.last is not None)
        return tuple(run for run in measured if run.finished) or measured


def find_runs(folders: Sequence[Path]) -> list[FoundRun]:
    """Every run of these folders, each once: the folder itself, or the runs directly in it.

    Raises ConfigError for a folder without a run, or settings that cannot be read; DataError for damaged
    records.
    """
    paths: dict[Path, Path] = {}
    for folder in folders:
        found = runs_in(folder)
        if not RunFolder(found[0]).config.is_file():
            raise ConfigError(
                f"{folder}: no run here, nor in the folders in it; give the folder of a run or of several"
            )
        paths |= {path.resolve(): path for path in found}
    return [read_run(path) for path in paths.values()]


def read_run(path: Path) -> FoundRun:
    """A run as its folder has it."""
    folder = RunFolder(path)
    config = folder.read_config()
    check_whole(folder.metrics)
    try:
        headline = make_objective(config).headline
    except ConfigError as error:
        raise ConfigError(f"{folder.config}: {error}") from None
    epochs = [record for record in read_records(folder.metrics) if record["kind"] == "epoch"]
    return FoundRun(path, config, headline, epochs, _seconds(read_entries(path / "starts.jsonl")))


def group_runs(runs: Sequence[FoundRun]) -> list[Group]:
    """Runs that differ in the seed only, together; in the order of the methods.

    A run with the same settings and the same seed as another one is a group of its own.
    """
    groups: dict[Any, list[FoundRun]] = {}
    for run in sorted(runs, key=lambda run: (list(METHODS).index(run.config.method), run.config.seed)):
        key, twin = _what_counts(run), 0
        while any(run.config.seed == other.config.seed for other in groups.get((key, twin), [])):
            twin += 1
        groups.setdefault((key, twin), []).append(run)
    members = list(groups.values())
    labels = _labels(members)
    return [Group(label, tuple(each)) for label, each in zip(labels, members, strict=True)]


def text_of(value: Any) -> str:
    """A setting as it is shown."""
    if isinstance(value, list):
        return ",".join(map(str, value))  # pyright: ignore[reportUnknownArgumentType]
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)


def _what_counts(run: FoundRun) -> tuple[tuple[str, str], ...]:
    """All that must be equal of runs that differ in their seed only.

    The runs that they begin with or are taught by may be those of their own seed.
    """
    ignored = FREE_SETTINGS | OF_EACH_RUN
    flags = {key: text_of(value) for key, value in run.flags.items() if key not in ignored}
    for key in ("kd.teacher", "init"):
        inside = f"{run.path.name}/teacher"  # where a teacher lies that was trained with the run
        own = flags[key].replace(f"seed{run.config.seed}", "seed")
        flags[key] = "teacher" if flags[key].endswith(inside) else own
    return tuple(flags.items())


def _labels(groups: Sequence[Sequence[FoundRun]]) -> list[str]:
    """The method, and what tells it from other groups of the method; each label is another."""
    labels: list[str] = []
    for runs in groups:
        first = runs[0].config
        rivals = [other for other in groups if other[0].config.method == first.method]
        settings = [dict(_what_counts(other[0])) for other in rivals]
        told = [key for key in settings[0] if len({each.get(key) for each in settings}) > 1]
        own = dict(_what_counts(runs[0]))
        named = [key for key in told if key in ("model", "data.dataset")]
        rest = [key for key in told if key not in named]
        label = " ".join([first.method, *(own[key] for key in named)])
        if len(rest) > SHORT_LABEL:
            label += f" ({_name(runs)})"
        else:
            label += "".join(f", {_flag_tail(key)} {own[key]}" for key in rest)
        labels.append(label)
    names = [_name(runs) for runs in groups]
    labels = [
        f"{label} ({name})" if labels.count(label) > 1 else label
        for label, name in zip(labels, names, strict=True)
    ]
    return [f"{label} {n}" if labels.count(label) > 1 else label for n, label in enumerate(labels, 1)]


def _name(runs: Sequence[FoundRun]) -> str:
    """The folder of a run; of several seeds, without the seed."""
    name = runs[0].path.name
    return name if len(runs) == 1 else name.removesuffix(f"seed{runs[0].config.seed}").rstrip("-") or name


def _flag_tail(key: str) -> str:
    return key.rpartition(".")[2].replace("_", "-")


def _seconds(entries: Sequence[Entry]) -> float | None:
    """From start to end of each process of a run, together; None if one of them has no end."""
    total, begun = 0.0, None
    try:
        for entry in entries:
            at = datetime.datetime.fromisoformat(entry["time"])
            if (entry["event"] == "started") == (begun is not None):
                return None
            if begun is None:
                begun = at
            else:
                total, begun = total + (at - begun).total_seconds(), None
    except (KeyError, TypeError, ValueError):
        return None
    return total if entries and begun is None else None
