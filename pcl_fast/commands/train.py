"""`pcl-fast train PRESET [--flags]`: train a preset, or go on with it."""

import contextlib
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from pcl_fast.build import build_network
from pcl_fast.commands.compare import report_comparison, report_run
from pcl_fast.commands.data import opened_data
from pcl_fast.commands.settings import Chosen, choose
from pcl_fast.config import Config
from pcl_fast.config_file import differences
from pcl_fast.contract import OpenData
from pcl_fast.dist import ALONE, World, joined
from pcl_fast.errors import ConfigError
from pcl_fast.figures import describe_rate
from pcl_fast.first_weights import begin_with, read_first_weights
from pcl_fast.objectives import make_objective
from pcl_fast.run_folder import FREE_SETTINGS, RunFolder
from pcl_fast.signals import StopSignal
from pcl_fast.sinks import CurvesSink, JsonlSink, LiveConsole, PlainConsole, Sink
from pcl_fast.trainer import Trainer, train_together

Runs = Sequence[tuple[Config, Path]]


def main(words: Sequence[str]) -> None:
    """Train every run of the preset, in turn or side by side, and print what was reached."""
    chosen = choose("train", words)
    first = chosen.runs[0][0]
    with joined(torch.device(first.device), first.dist.timeout) as world, StopSignal() as stop:
        world.pass_on(stop)
        world.on_all(lambda: _check_ranks(chosen, world))
        given = world.gather([config for config, _ in chosen.runs])
        world.on_all(lambda: _check_alike(given))
        console = Console(quiet=not world.is_first)
        for runs in _groups(chosen):
            train(runs, console, world, stop)
        if world.is_first:
            _report(chosen, console)


def _check_ranks(chosen: Chosen, world: World) -> None:
    ranks = chosen.runs[0][0].ranks
    if ranks != world.size:
        raise ConfigError(
            f"--ranks {ranks}: there is {world.size}; start them with "
            f"torchrun --standalone --nproc-per-node {ranks} -m pcl_fast train ..."
        )
    if chosen.side_by_side and world.size > 1:
        raise ConfigError(
            "--seeds: several seeds side by side are for one rank; give --seed, a run at a time"
        )


def _check_alike(given: Sequence[Sequence[Config]]) -> None:
    """Every rank's runs must be the first one's, but for where its files and its device are."""
    for rank, configs in enumerate(given):
        if len(configs) != len(given[0]):
            raise ConfigError(f"rank {rank} has other runs than rank 0; give all ranks the same command")
        pairs = zip(given[0], configs, strict=True)
        changed = [line for first, own in pairs for line in differences(first, own, FREE_SETTINGS)]
        if changed:
            raise ConfigError(f"rank {rank} has other settings than rank 0: {'; '.join(changed)}")


def _groups(chosen: Chosen) -> list[Runs]:
    """The runs that train at the same time: one, or all seeds of a method."""
    if not chosen.side_by_side:
        return [[run] for run in chosen.runs]
    methods = dict.fromkeys(config.method for config, _ in chosen.runs)
    return [[run for run in chosen.runs if run[0].method == method] for method in methods]


def _report(chosen: Chosen, console: Console) -> None:
    if len(chosen.runs) > 1:
        report_comparison(chosen, console)
    else:
        report_run(RunFolder(chosen.runs[0][1]), console)


def train(runs: Runs, console: Console, world: World = ALONE, stop: StopSignal | None = None) -> None:
    """Train resolved configurations, each in its folder, side by side, on all ranks of `world`.

    A signal that `stop` has received is served as if it came in the first step.
    """
    with contextlib.ExitStack() as stack:
        trainers: list[Trainer] = []
        for given, path in runs:
            folder = RunFolder(path)
            config = _fitting(given, folder, world)
            data = _opened(config, stack, world)
            world.on_first(partial(_check_first_weights, folder, config))
            world.on_first(partial(_claim, folder, config, stack))
            _say_sizes(config, given, console)
            sinks = _sinks(folder, console, alone=len(runs) == 1) if world.is_first else []
            trainers.append(Trainer(config, data, folder, sinks, world))
        train_together(trainers, stop)


def _fitting(config: Config, folder: RunFolder, world: World) -> Config:
    """The configuration for as many ranks as there are now; all look at what the first one sees."""
    batch_size = world.on_first(lambda: folder.fitting(config).train.batch_size)
    return replace(config, train=replace(config.train, batch_size=batch_size))


def _opened(config: Config, stack: contextlib.ExitStack, world: World) -> OpenData:
    """This rank's loaders, of the same data on all ranks."""
    world.enter("opening data", 0)
    views = make_objective(config).num_views
    data = world.on_all(lambda: stack.enter_context(opened_data(config, views, world.rank)))
    sizes = {"images": data.train.num_samples, "steps an epoch": data.train.steps_per_epoch}
    world.agree("data set", sizes | {"fingerprint": config.data.fingerprint})
    return data


def _check_first_weights(folder: RunFolder, config: Config) -> None:
    """Raise what is wrong with `--init` before the folder is taken for a run that begins with it."""
    given = None if folder.goes_on(config) else read_first_weights(config)
    if given is not None:
        objective = make_objective(config)
        begin_with(build_network(config, objective), objective, given)


def _claim(folder: RunFolder, config: Config, stack: contextlib.ExitStack) -> None:
    """Hold the folder until the end of the stack."""
    stack.callback(folder.claim(config).close)


def _say_sizes(config: Config, given: Config, console: Console) -> None:
    """What several ranks change, in one line."""
    images, total = config.train.batch_size, config.global_batch
    adapted = images != given.train.batch_size
    if config.ranks == 1 and not adapted:
        return
    parts = [
        f"{total:,} images a step"
        if config.ranks == 1
        else f"{config.ranks} ranks x {images:,} = {total:,} images a step"
    ]
    if adapted:
        parts.append(
            f"not {given.train.batch_size:,} a rank, as the run goes on with the batch that it began with"
        )
    parts.append(f"learning rate {describe_rate(config)}")
    parts.append(f"BatchNorm over {'all ranks' if config.sync_bn else 'each rank'}")
    console.print("; ".join(parts), highlight=False, soft_wrap=True, markup=False)


def _sinks(folder: RunFolder, console: Console, alone: bool) -> list[Sink]:
    """A live display for one run in a terminal, else lines; and the files of the run."""
    live = alone and sys.stdout.isatty()
    terminal = LiveConsole(console) if live else PlainConsole(console)
    return [JsonlSink(folder.metrics), terminal, CurvesSink(folder.curves, folder.metrics)]
