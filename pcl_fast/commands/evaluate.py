"""`pcl-fast evaluate RUN`: the accuracy of every network in a run folder."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table

from pcl_fast import atomic
from pcl_fast.build import build_state
from pcl_fast.commands.data import opened_val
from pcl_fast.commands.flags import read_flags
from pcl_fast.config import Backend
from pcl_fast.device import resolve
from pcl_fast.errors import ConfigError
from pcl_fast.evaluate import tally_state
from pcl_fast.metrics import Accuracy, Tally, accuracies, compared
from pcl_fast.run_folder import RunFolder, runs_in


@dataclass(frozen=True)
class EvaluateArguments:
    """Every peer, every mean teacher, PCL and PCL-E of a run, from its newest checkpoint."""

    run: tyro.conf.Positional[Path]
    """Folder of a run, or of a comparison (then each of its runs)"""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N"""
    root: Path | None = None
    """Folder of the fetched data sets, if not that of the run"""
    val: Path | None = None
    """The validation images (a .beton file or a folder), if not those of the run"""
    backend: Backend | None = None
    """The library that decodes them, if not that of the run"""
    workers: int | None = None
    """Threads or processes that decode; by default one for each core"""
    json: Path | None = None
    """Write the figures to this file, and under `between` how alike the heads are: share of equal answers,
    KL in nats, distance of predictions"""


def main(words: Sequence[str]) -> None:
    """Print a table for every run in the folder."""
    arguments = read_flags(EvaluateArguments, words, "pcl-fast evaluate")
    console = Console()
    figures: dict[str, dict[str, Any]] = {}
    for path in runs_in(arguments.run):
        tally, names = evaluate_run(path, arguments)
        heads, between = accuracies([tally]), compared([tally])
        figures[str(path)] = {head: accuracy.as_dict() for head, accuracy in heads.items()}
        if between is not None:
            figures[str(path)]["between"] = between.as_dict()
        console.print(accuracy_table(str(path), heads, names))
    if arguments.json is not None:
        atomic.write_text(arguments.json, json.dumps(figures, indent=2) + "\n")


def evaluate_run(path: Path, arguments: EvaluateArguments) -> tuple[Tally, dict[str, str]]:
    """What the heads of a run's newest checkpoint count, and the names its results are reported under."""
    folder = RunFolder(path)
    config = folder.read_config()
    changes = {name: getattr(arguments, name) for name in ("root", "val", "backend", "workers")}
    given = {name: value for name, value in changes.items() if value is not None}
    data = dataclasses.replace(config.data, **given)
    config = resolve(dataclasses.replace(config, device=arguments.device, data=data))
    state = build_state(config, teach=False)
    saved = folder.checkpoints.load_newest(Console(stderr=True).print)
    if saved is None:
        raise ConfigError(f"{path}: no checkpoint yet; let the run reach the end of an epoch")
    state.load_state_dict(saved["state"])
    with opened_val(config) as val:
        return tally_state(state, val), state.objective.headline


def accuracy_table(title: str, heads: dict[str, Accuracy], headline: dict[str, str]) -> Table:
    """A row a head; the heads a method is judged by carry its names."""
    names = {head: name for name, head in headline.items()}
    table = Table(title=title, title_justify="left")
    for column in ("head", "top-1 %", "top-5 %", "loss", "ECE %"):
        table.add_column(column, justify="left" if column == "head" else "right")
    for head, accuracy in heads.items():
        label = f"{head.replace('_', ' ')} = {names[head]}" if head in names else head.replace("_", " ")
        style = "bold" if head in names else None
        cells = (f"{accuracy.top1:.2f}", f"{accuracy.top5:.2f}", f"{accuracy.loss:.4f}")
        table.add_row(label, *cells, f"{accuracy.ece:.2f}", style=style)
    images = next(iter(heads.values())).images
    table.caption = f"{images:,} images"
    return table
