"""`pcl-fast train PRESET [--flags]`: train a preset, or go on with it."""

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from pcl_fast.commands.compare import report_comparison, report_run
from pcl_fast.commands.data import opened_data
from pcl_fast.commands.settings import choose
from pcl_fast.config import Config
from pcl_fast.objectives import make_objective
from pcl_fast.run_folder import RunFolder
from pcl_fast.sinks import CurvesSink, JsonlSink, LiveConsole, PlainConsole
from pcl_fast.trainer import Trainer


def main(words: Sequence[str]) -> None:
    """Train every run of the preset in turn and print what was reached."""
    chosen = choose("train", words)
    console = Console()
    for config, path in chosen.runs:
        run(config, path, console)
    if chosen.preset.is_comparison:
        report_comparison(chosen, console)
    else:
        report_run(RunFolder(chosen.runs[0][1]), console)


def run(config: Config, path: Path, console: Console) -> None:
    """Train one resolved configuration in its folder."""
    folder = RunFolder(path)
    with opened_data(config, make_objective(config).num_views) as data:
        lock = folder.claim(config)
        try:
            terminal = LiveConsole(console) if sys.stdout.isatty() else PlainConsole(console)
            sinks = [JsonlSink(folder.metrics), terminal, CurvesSink(folder.curves, folder.metrics)]
            Trainer(config, data, folder, sinks).run()
        finally:
            lock.close()
