"""`pcl-fast config PRESET [--flags]`: what a run would do, without doing it."""

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pcl_fast.build import describe_kernels
from pcl_fast.commands.image_data import count_train_images
from pcl_fast.commands.settings import choose
from pcl_fast.config import Config
from pcl_fast.config_file import flatten, to_dict
from pcl_fast.figures import RunFigures, describe_rate, run_figures
from pcl_fast.objectives import make_objective

PREFIXES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def main(words: Sequence[str]) -> None:
    """Print the figures and all settings of every method of the preset."""
    chosen = choose("config", words)
    console = Console()
    first_of_method = {config.method: (config, path) for config, path in reversed(chosen.runs)}
    for config, path in reversed(first_of_method.values()):
        console.print(figures_table(config, path, run_figures(config, count_train_images(config))))
    seeds = len(chosen.runs) // len(first_of_method)
    if len(chosen.runs) > 1:
        console.print(f"{len(chosen.runs)} runs: each method with {seeds} seed{'s' * (seeds > 1)}\n")
    console.print(settings_table(chosen.runs[0][0]))


def figures_table(config: Config, path: Path, figures: RunFigures) -> Table:
    """The derived numbers of one run."""
    table = Table(title=f"{config.method}: {config.model} on {config.data.dataset}", title_justify="left")
    table.show_header = False
    mebibytes = figures.deployed_bytes / 2**20
    rows = {
        "run folder": str(path),
        "device": f"{config.device}, {config.amp.dtype}, channels-last {config.channels_last}",
        "kernels": describe_kernels(config),
        "training images": f"{figures.train_images:,} of {config.data.classes} classes{_from(config)}",
        "global batch": _batch(figures),
        "steps": f"{figures.steps_per_epoch:,} an epoch, {figures.total_steps:,} in all",
        "learning rate": _rate(config, figures),
        "parameters trained": f"{figures.trained_parameters:,}",
        "network deployed": f"{figures.deployed_parameters:,} parameters, {mebibytes:.2f} MiB, "
        f"{short(figures.deployed_flops_per_image)}FLOPs an image",
        "training FLOPs": f"{short(figures.train_flops_per_image)}FLOPs an image and step, "
        f"{short(figures.total_flops)}FLOPs in all",
    }
    objective = make_objective(config)
    if objective.ramps_up:
        averages = objective.uses_mean_teacher
        rows["distillation"] = (
            f"w rises to {config.pcl.distill_weight:g} over {config.pcl.rampup_epochs:g} epochs"
            + f", EMA coefficient to {config.pcl.ema_decay:g}" * averages
        )
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _batch(figures: RunFigures) -> str:
    """Images and views a step, and of how many ranks they are."""
    total = f"{figures.global_batch:,} images x {figures.views_per_image} views"
    return f"{figures.ranks} ranks x {figures.rank_batch:,} = {total}" if figures.ranks > 1 else total


def _rate(config: Config, figures: RunFigures) -> str:
    """The learning rate, what it is scaled from, and what becomes of it."""
    drops = ", ".join(str(epoch) for epoch in figures.lr_drop_epochs)
    return describe_rate(config) + (f", x{config.optim.gamma:g} at epochs {drops}" if drops else "")


def _from(config: Config) -> str:
    """Where the training images are, if they are not simply the published ones."""
    data = config.data
    if data.train is not None:
        return f", {data.train}, decoded by {data.backend}"
    return (
        ", not given yet: --data.train" if data.dataset == "imagenet" and data.backend != "synthetic" else ""
    )


def settings_table(config: Config) -> Table:
    """Every setting, as the flag that changes it."""
    table = Table(
        title="settings (resolved)", title_justify="left", box=None, padding=(0, 2), show_header=False
    )
    for key, value in flatten(to_dict(config)).items():
        table.add_row(f"--{key.replace('_', '-')}", json.dumps(value))
    return table


def short(number: float) -> str:
    """A large number with an SI prefix: 69.4 M."""
    for size, prefix in PREFIXES:
        if number >= size:
            return f"{number / size:.3g} {prefix}"
    return f"{number:g} "
