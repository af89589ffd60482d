"""`pcl-fast train PRESET [--flags]`: train a preset, or go on with it."""

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from pcl_fast.commands.compare import report_comparison, report_run
from pcl_fast.commands.data import opened_data
from pcl_fast.commands.settings import Chosen, choose
from pcl_fast.config import Config
from pcl_fast.objectives import make_objective
from pcl_fast.run_folder import RunFolder
from pcl_fast.sinks import CurvesSink, JsonlSink, LiveConsole, PlainConsole, Sink
from pcl_fast.trainer import Trainer, train_together

Runs = Sequence[tuple[Config, Path]]


def main(words: Sequence[str]) -> None:
    """Train every run of the preset, in turn or side by side, and print what was reached."""
    chosen = choose("train", words)
    console = Console()
    for runs in _groups(chosen):
        train(runs, console)
    if len(chosen.runs) > 1:
        report_comparison(chosen, console)
    else:
        report_run(RunFolder(chosen.runs[0][1]), console)


def _groups(chosen: Chosen) -> list[Runs]:
    """The runs that train at the same time: one, or all seeds of a method."""
    if not chosen.side_by_side:
        return [[run] for run in chosen.runs]
    methods = dict.fromkeys(config.method for config, _ in chosen.runs)
    return [[run for run in chosen.runs if run[0].method == method] for method in methods]


def train(runs: Runs, console: Console) -> None:
    """Train resolved configurations, each in its folder, side by side."""
    with contextlib.ExitStack() as stack:
        trainers: list[Trainer] = []
        for config, path in runs:
            folder = RunFolder(path)
            data = stack.enter_context(opened_data(config, make_objective(config).num_views))
            stack.callback(folder.claim(config).close)
            sinks = [
                JsonlSink(folder.metrics),
                _terminal(console, alone=len(runs) == 1),
                CurvesSink(folder.curves, folder.metrics),
            ]
            trainers.append(Trainer(config, data, folder, sinks))
        train_together(trainers)


def _terminal(console: Console, alone: bool) -> Sink:
    """A live display for one run in a terminal, else lines."""
    return LiveConsole(console) if alone and sys.stdout.isatty() else PlainConsole(console)
