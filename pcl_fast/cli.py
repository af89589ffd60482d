"""`pcl-fast COMMAND ...`: picks the command, and turns errors into one line and an exit code."""

import importlib
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from pcl_fast import __version__
from pcl_fast.errors import ConfigError, PclError, Preempted, did_you_mean

COMMANDS = {
    "train": "train a preset, or go on with it",
    "evaluate": "accuracy of every network in a run folder",
    "report": "runs side by side, as a page: curves, results, how alike peers are, settings that differ",
    "fetch": "get CIFAR-10 or CIFAR-100",
    "convert": "make a .beton file of ImageNet, of a folder of images, or of CIFAR",
    "verify": "check a .beton file: every checksum, every image",
    "reproduce": "the paper's tables: every method, network and seed, beside what was reported",
    "config": "what a preset would do: settings, steps, parameters, FLOPs",
    "plan": "what a preset is expected to take on several GPUs: time, cores, memory, network",
    "profile": "speed of a preset's training; `profile data FILE`: of the loaders; `profile gpu`: of a GPU",
}
PROGRAM = "pcl-fast"
INTERRUPTED = 130  # the shell's code for a program ended by Ctrl-C


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (without the program's name); returns the exit code.

    0 done; 2 a setting or a flag is wrong; 3 the data is; 4 training diverged; 75 stopped and saved.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(words)
    except PclError as error:
        if not error.told_elsewhere:
            _tell(error, words)
        return error.exit_code
    except torch.OutOfMemoryError as error:
        advice = "A step holds one view per peer: halve --train.batch-size"
        reason = str(error).split("\n")[0]
        return _fail(f"error: out of memory: {reason} {advice}", 1)
    except OSError as error:
        return _fail(f"error: {error}", 1)
    except KeyboardInterrupt:
        return _fail("interrupted; what was not saved before is lost", INTERRUPTED)


def _dispatch(words: list[str]) -> int:
    if words[:1] in ([], ["-h"], ["--help"]):
        _print_help()
        return 0 if words else ConfigError.exit_code
    if words[0] == "--version":
        sys.stdout.write(f"pcl-fast {__version__}\n")
        return 0
    if words[0] not in COMMANDS:
        hint = did_you_mean(words[0], COMMANDS) or f" There are: {', '.join(COMMANDS)}."
        raise ConfigError(f"unknown command '{words[0]}'.{hint}")
    command = importlib.import_module(f"pcl_fast.commands.{words[0]}")
    command.main(words[1:])
    return 0


def _print_help() -> None:
    lines = [f"  {name:<10}{about}" for name, about in COMMANDS.items()]
    sys.stdout.write(
        "usage: pcl-fast COMMAND ...\n\nFast, faithful Peer Collaborative Learning.\n\ncommands:\n"
        + "\n".join(lines)
        + "\n\n`pcl-fast COMMAND --help` tells more; `pcl-fast train --help` lists the presets.\n"
    )


def _tell(error: PclError, words: list[str]) -> None:
    if isinstance(error, Preempted):
        _fail(f"{error}\nto go on:  {_command_to_resume(words)}", error.exit_code)
    else:
        _fail(f"error: {error}", error.exit_code)


def _command_to_resume(words: list[str]) -> str:
    """The same command, but for what would begin anew."""
    kept = [word for word in words if word.replace("_", "-") != "--no-resume"]
    ranks = os.environ.get("WORLD_SIZE", "1")
    if ranks == "1":
        return shlex.join([_program(), *kept])
    if os.environ.get("LOCAL_WORLD_SIZE", ranks) != ranks:
        return "the same torchrun command on every node"
    return shlex.join(["torchrun", "--standalone", "--nproc-per-node", ranks, "-m", "pcl_fast", *kept])


def _program() -> str:
    """This program as a shell here finds it: by its name, else by the path it was called by."""
    called, found = Path(sys.argv[0]), shutil.which(PROGRAM)
    reachable = called.name != PROGRAM or (found is not None and Path(found).resolve() == called.resolve())
    return PROGRAM if reachable else str(called)


def _fail(message: str, code: int) -> int:
    rank = f"rank {os.environ.get('RANK')}: " if os.environ.get("WORLD_SIZE", "1") != "1" else ""
    Console(stderr=True).print(f"pcl-fast: {rank}{message}", highlight=False, soft_wrap=True, markup=False)
    return code
