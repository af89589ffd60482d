"""What runs have reached, as tables and a plot: a run alone, or the methods of a comparison."""

import json
import statistics
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from pcl_fast import atomic
from pcl_fast.commands.settings import Chosen
from pcl_fast.objectives import make_objective
from pcl_fast.run_folder import RunFolder
from pcl_fast.sinks import Record, draw_curves, evaluations, read_records

Finals = dict[str, list[float]]


def report_run(folder: RunFolder, console: Console) -> None:
    """Print a finished run's headline results and where its files are."""
    record = _last_evaluation(folder)
    headline = make_objective(folder.read_config()).headline
    reached = ", ".join(f"{name} {record['val'][head]['top1']:.2f}%" for name, head in headline.items())
    _say(console, f"top-1 after epoch {record['epoch'] + 1}: {reached}")
    _say(console, f"deployable network {folder.model}, curves {folder.curves}")


def report_comparison(chosen: Chosen, console: Console) -> None:
    """Print each method's results over all seeds, as they are, and plot them side by side.

    Writes `comparison.json` and `curves.png` into the folder of them all.
    """
    finals: Finals = {}
    curves: dict[str, list[Record]] = {}
    headlines: dict[str, dict[str, str]] = {}
    for config, path in chosen.runs:
        folder = RunFolder(path)
        headline = make_objective(config).headline
        record = _last_evaluation(folder)
        for name, head in headline.items():
            finals.setdefault(name, []).append(record["val"][head]["top1"])
        curves[f"{config.method} {config.seed}"] = read_records(folder.metrics)
        headlines[f"{config.method} {config.seed}"] = headline
    summary = summarise(finals)
    atomic.write_text(chosen.folder / "comparison.json", json.dumps(summary, indent=2) + "\n")
    draw_curves(chosen.folder / "curves.png", curves, headlines)
    console.print(comparison_table(summary, chosen.runs[0][0].train.epochs))
    if chosen.preset.note:
        _say(console, chosen.preset.note)
    _say(console, f"curves {chosen.folder / 'curves.png'}; deployable networks in")
    for _, path in chosen.runs:
        _say(console, f"  {RunFolder(path).model}")


def summarise(finals: Finals) -> dict[str, Any]:
    """Top-1 of every seed, their mean and standard deviation (None of one), for each result's name."""
    return {
        name: {
            "top1": values,
            "mean": statistics.fmean(values),
            "std": spread(values),
        }
        for name, values in finals.items()
    }


def spread(values: Sequence[float]) -> float | None:
    """The standard deviation over seeds; None of one."""
    return statistics.stdev(values) if len(values) > 1 else None


def comparison_table(summary: dict[str, Any], epochs: int) -> Table:
    """One row a result: mean and spread over the seeds, every seed, and the difference to vanilla."""
    table = Table(title=f"test top-1 (%) after the last of {epochs} epochs", title_justify="left")
    table.add_column("")
    vanilla = summary.get("vanilla")
    for column in ("mean", "std", "each seed", *["over vanilla"] * (vanilla is not None)):
        table.add_column(column, justify="right")
    for name, result in summary.items():
        spread = "one seed" if result["std"] is None else f"{result['std']:.2f}"
        seeds = "  ".join(f"{value:.2f}" for value in result["top1"])
        row = [name, f"{result['mean']:.2f}", spread, seeds]
        if vanilla is not None:
            row.append("" if result is vanilla else f"{result['mean'] - vanilla['mean']:+.2f}")
        table.add_row(*row)
    return table


def _last_evaluation(folder: RunFolder) -> Record:
    return evaluations(read_records(folder.metrics))[-1]


def _say(console: Console, message: str) -> None:
    console.print(message, highlight=False, soft_wrap=True, markup=False)
