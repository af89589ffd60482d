"""A preset and its flags, parsed: shared by the commands that take `PRESET [--flags]`."""

import contextlib
import dataclasses
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeVar

from rich.console import Console
from rich.table import Table

from pcl_fast.build import build_network
from pcl_fast.commands.data import fit_to_data
from pcl_fast.commands.flags import read_flags
from pcl_fast.config import Config
from pcl_fast.device import resolve
from pcl_fast.dist import find_place
from pcl_fast.errors import ConfigError
from pcl_fast.models.split import NO_TRUNK
from pcl_fast.objectives import make_objective
from pcl_fast.presets import Preset, find_preset, preset_names

Options = TypeVar("Options")


@contextlib.contextmanager
def _told_once() -> Generator[None]:
    """Of several ranks that cannot read the same words, one says so."""
    try:
        yield
    except ConfigError as error:
        error.told_elsewhere = not find_place().is_first
        raise


@dataclass(frozen=True, slots=True)
class Chosen:
    """A preset with the user's settings: its runs, resolved, and the folder of each.

    `folder` is that of a run alone, or of what several have reached together; `side_by_side`, runs of a
    method train at the same time.
    """

    preset: Preset
    folder: Path
    runs: list[tuple[Config, Path]]
    side_by_side: bool


def choose(command: str, words: Sequence[str]) -> Chosen:
    """Parse `PRESET [--flags]` of a command; prints help and exits where that is asked for.

    ConfigError for a wrong flag, with the nearest right one, and for an unknown preset; DataError for images
    that cannot be used.
    """
    with _told_once():
        preset, flags = _find(command, words)
        prog = _prog(command, preset)
        config = read_flags(Config, flags, prog, default=preset.config, description=preset.about)
    return _chosen(preset, config)


def choose_with(command: str, words: Sequence[str], options: Options) -> tuple[Chosen, Options]:
    """`choose`, for a command with flags of its own.

    `options` holds their defaults and comes back as given by the user; its field `steps` is the flag
    `--COMMAND.steps`.
    """
    import tyro  # late: `profile gpu` also runs where it is missing

    with _told_once():
        preset, flags = _find(command, words)
        fields = [("config", Annotated[Config, tyro.conf.arg(name="")]), (command, type(options))]
        flags_type = dataclasses.make_dataclass("Flags", fields, frozen=True)
        default, prog = flags_type(preset.config, options), _prog(command, preset)
        both = read_flags(flags_type, flags, prog, default=default, description=preset.about)
    return _chosen(preset, both.config), getattr(both, command)


def _find(command: str, words: Sequence[str]) -> tuple[Preset, Sequence[str]]:
    if not words or words[0].startswith("-"):
        _print_presets(command)
        raise SystemExit(0 if words[:1] in (["-h"], ["--help"]) else ConfigError.exit_code)
    return find_preset(words[0]), _spread_seeds(words[1:])


def _spread_seeds(words: Sequence[str]) -> list[str]:
    """`--seeds 0,1,2` as the parser wants it: `--seeds 0 1 2`."""
    spread: list[str] = []
    for word in words:
        flag, given, value = word.partition("=")
        if flag == "--seeds" and given:
            spread += [flag, *value.split(",")]
        else:
            spread += word.split(",") if spread[-1:] == ["--seeds"] else [word]
    return spread


def _prog(command: str, preset: Preset) -> str:
    return f"pcl-fast {command} {preset.name}"


def _chosen(preset: Preset, config: Config) -> Chosen:
    _check_method(config)
    if config.method != preset.config.method and len(preset.methods) > 1:
        raise ConfigError(
            f"--method {config.method}: preset '{preset.name}' trains {' and '.join(preset.methods)}"
        )
    resolved = fit_to_data(resolve(config))
    folder = config.run_dir or _default_folder(preset, config)
    runs = [
        stage
        for run in preset.runs(resolved)
        for stage in _stages(run, _run_folder(preset, folder, config, run))
    ]
    for run, _ in runs:
        _check_backbones(run)
    return Chosen(preset, folder, runs, side_by_side=len(config.seeds) > 1)


def _check_method(config: Config) -> None:
    """ConfigError for a method that there is not, or without what it wants; for a split of what has none."""
    objective, method = make_objective(config), config.method
    if objective.wants_held_out and not config.data.hold_out:
        target = f" --kdcl.target {config.kdcl.target}" if method == "kdcl" else ""
        raise ConfigError(
            f"--method {method}{target}: it learns from training images that are held out; "
            "give --data.hold-out, as 1000"
        )
    if not objective.shares_trunk and config.split not in (None, NO_TRUNK):
        separate = hasattr(getattr(config, method, None), "separate")
        instead = f", or give --{method}.no-separate for branches that share a trunk" if separate else ""
        raise ConfigError(
            f"--split {config.split}: the networks of --method {method} share nothing; leave it out{instead}"
        )


def _check_backbones(config: Config) -> None:
    """ConfigError for several backbones that do not go together, before a folder is taken for them."""
    if "," in config.model:
        build_network(config, make_objective(config))


def _stages(run: Config, folder: Path) -> list[tuple[Config, Path]]:
    """The run itself; before it that of its teacher, if it needs one that is to be trained first."""
    if run.method != "kd" or run.kd.teacher is not None:
        return [(run, folder)]
    teacher = folder / "teacher"
    first = dataclasses.replace(run, method="vanilla", model=run.kd.teacher_model or run.model, init=None)
    second = dataclasses.replace(run, kd=dataclasses.replace(run.kd, teacher=teacher))
    return [(first, teacher), (second, folder)]


def _default_folder(preset: Preset, config: Config) -> Path:
    seeds = "-".join(map(str, config.seeds))
    suffix = "" if preset.is_comparison else f"-seeds-{seeds}" if seeds else f"-seed{config.seed}"
    if config.method != preset.config.method:
        suffix = f"-{config.method}{suffix}"
    return Path("runs") / f"{preset.name}{suffix}"


def _run_folder(preset: Preset, folder: Path, config: Config, run: Config) -> Path:
    """A seed of several has the folder that it would have alone, unless one is given for all of them."""
    if preset.is_comparison:
        return folder / f"{run.method}-seed{run.seed}"
    if config.seeds and config.run_dir is None:
        return _default_folder(preset, run)
    return folder / f"seed{run.seed}" if config.seeds else folder


def _print_presets(command: str) -> None:
    table = Table(box=None, padding=(0, 2), show_header=False)
    for name in preset_names():
        if not name.endswith("-vanilla"):
            table.add_row(name, find_preset(name).about.split("\n")[0])
    console = Console()
    console.print(f"usage: pcl-fast {command} PRESET [--flags]\n\npresets:", markup=False, highlight=False)
    console.print(table)
    console.print(
        "\nEach row of the paper has a twin NAME-vanilla, the same network trained alone."
        f"\n`pcl-fast {command} PRESET --help` lists the flags.",
        markup=False,
        highlight=False,
    )
