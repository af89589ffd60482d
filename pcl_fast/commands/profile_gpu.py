"""`pcl-fast profile gpu`: every check and measurement of a GPU, into a JSON file and a page of markdown.

The parts run one after the other, each in a process of its own: this command again, with `--part`. The
standard library parses the flags, as a machine with a GPU may have torch and little else.
"""

import argparse
import dataclasses
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch

import pcl_fast
from pcl_fast.commands.profile_gpu_views import measure_views, open_random
from pcl_fast.errors import ConfigError, did_you_mean
from pcl_fast.profile.gpu import choices, device, kernels, norms, steps, suites
from pcl_fast.profile.gpu.bench import Bench
from pcl_fast.profile.gpu.found import FILE, Found
from pcl_fast.profile.gpu.report import write_section
from pcl_fast.profile.gpu.runner import Outcome, Part, add_row, run_parts

ROOT = Path(pcl_fast.__file__).parents[1]
COMMAND = (sys.executable, "-m", "pcl_fast", "profile", "gpu")
MINUTES = 8.0


@dataclass(frozen=True, slots=True)
class Job:
    """What a part does, and the most seconds it may take."""

    about: str
    limit: float
    run: Callable[[Bench], None]


def _compiled(*networks: steps.Network) -> Callable[[Bench], None]:
    """The same, tiny: a network of a tenth of the layers still takes a minute to compile on a CPU."""
    return lambda bench: steps.measure_compiled(bench, bench.pick(networks, ()))


# By worth: what does not fit into the time is not run.
JOBS: dict[str, Job] = {
    "device": Job("least times of kernels and launches; copies; products", 60, device.measure_device),
    "tests": Job("pytest -m gpu", 150, suites.run_gpu_tests),
    "paper-row": Job("steps of ResNet-32, batch 128, and of the baselines", 75, steps.measure_paper_row),
    "imagenet": Job("steps of ResNet-18 and ResNet-50", 100, steps.measure_imagenet),
    "updates": Job("the update of weights against its bytes", 40, kernels.measure_updates),
    "losses": Job("PCL's losses and gradients", 40, kernels.measure_losses),
    "norms": Job("BatchNorm, residual and ReLU", 50, norms.measure_norms),
    "cifar": Job("steps of the other networks of CIFAR", 90, steps.measure_cifar),
    "update-share": Job("the update within a step", 40, choices.measure_update_share),
    "seeds": Job("one, two and three runs side by side", 45, choices.measure_seeds),
    "choices": Job("views batched or in turn, streams, kernels", 75, choices.measure_choices),
    "views": Job("views made on the device", 40, measure_views),
    "counts": Job("kernels and launches of a step", 75, steps.count_steps),
    "compiled-resnet32": Job("through torch.compile", 120, _compiled(("resnet32", 128))),
    "kernel-tests": Job("the kernels' other tests, on the GPU", 75, suites.run_kernel_tests),
    "compiled-norms": Job("BatchNorm through torch.compile", 75, norms.measure_compiled_norms),
    "compiled-resnet18": Job("through torch.compile", 120, _compiled(("resnet18", 256))),
    "compiled-vgg16": Job("through torch.compile", 120, _compiled(("vgg16", 128))),
    "compiled-wrn20_8": Job("through torch.compile", 120, _compiled(("wrn20_8", 128))),
    "compiled-densenet40_12": Job("through torch.compile", 150, _compiled(("densenet40_12", 128))),
    "compiled-resnet50": Job("through torch.compile", 180, _compiled(("resnet50", 256))),
    "compiled-resnet110": Job("through torch.compile", 300, _compiled(("resnet110", 128))),
}


def main(words: Sequence[str]) -> None:
    """Measure, and keep what is found after every part; or be one of the parts."""
    asked = _parse(words)
    if asked.part is not None:
        _be_part(asked)
        return
    found, page = Found.load(asked.out / FILE), asked.out.with_name(asked.out.name + ".md")
    if asked.render:
        write_section(page, found)
        print(f"wrote {page}")
        return
    names = _chosen(asked.only)
    if not asked.rehearse and not torch.cuda.is_available():
        raise ConfigError(
            "profile gpu: torch finds no CUDA device here; run it on a machine with one, or give --rehearse"
        )
    if not asked.only:
        found = Found()
    _measure(asked, names, found, page)


def _measure(asked: argparse.Namespace, names: Sequence[str], found: Found, page: Path) -> None:
    command = " ".join(["pcl-fast profile gpu", *(["--only", asked.only] if asked.only else [])])
    command += " --rehearse" if asked.rehearse else ""
    about = {"command": command, "commit": _commit(asked.commit)}
    print(f"{len(names)} parts, at most {asked.minutes:g} minutes", flush=True)

    def report(part: Part, outcome: Outcome) -> None:
        date = datetime.now(UTC).isoformat(timespec="seconds")
        found.put(part, outcome, {"date": date, **about})
        found.save(asked.out / FILE)
        write_section(page, found)
        rows = f"{len(outcome.rows)} rows" if outcome.rows else "no rows"
        print(f"{part.name}: {outcome.status}, {outcome.seconds:.1f} s, {rows}", flush=True)
        if outcome.log:
            print(outcome.log, flush=True)

    signal.signal(signal.SIGTERM, _leave)  # so that the part that runs is ended, too
    run_parts([_part(name, asked) for name in names], 60 * asked.minutes, report)
    for line in found.troubles():
        print(f"- {line}")
    print(f"wrote {asked.out / FILE} and {page}")


def _part(name: str, asked: argparse.Namespace) -> Part:
    def command(rows: Path, seconds: float) -> list[str]:
        words = [*COMMAND, "--part", name, "--rows", str(rows), "--seconds", f"{seconds:.1f}"]
        return [*words, "--out", str(asked.out), *(["--rehearse"] if asked.rehearse else [])]

    return Part(name=name, about=JOBS[name].about, limit=JOBS[name].limit, command=command)


def _be_part(asked: argparse.Namespace) -> None:
    """Measure one part, row by row into a file."""
    if asked.rehearse:
        os.environ.setdefault("TRITON_INTERPRET", "1")  # before the first kernel is defined
    bench = Bench(
        device=torch.device("cpu" if asked.rehearse else "cuda"),
        add=partial(add_row, asked.rows),
        open_loader=partial(open_random, asked.rehearse),
        ceilings=Found.load(asked.out / FILE).ceilings,
        tiny=asked.rehearse,
        left=asked.seconds,
    )
    if asked.rehearse:
        bench = dataclasses.replace(bench, samples=2, seconds=0.0)
    JOBS[asked.part].run(bench)


def _parse(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="pcl-fast profile gpu", description=(__doc__ or "").split("\n")[0])
    out = "folder of gpu.json; the page is OUT.md (default: docs/measurements)"
    parser.add_argument("--out", type=Path, default=Path("docs/measurements"), help=out)
    only = f"these parts, with commas between; others keep what was found before: {', '.join(JOBS)}"
    parser.add_argument("--only", default="", help=only)
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all of it (default: %(default)g)")
    parser.add_argument("--commit", help="what is measured, where git does not tell")
    parser.add_argument("--render", action="store_true", help="write the page from gpu.json alone")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, on the CPU: does it all run?")
    for inner, kind in (("--part", str), ("--rows", Path), ("--seconds", float)):
        parser.add_argument(inner, type=kind, help=argparse.SUPPRESS)
    return parser.parse_args(words)


def _chosen(only: str) -> list[str]:
    names = [name for name in only.split(",") if name] or list(JOBS)
    for name in names:
        if name not in JOBS:
            hint = did_you_mean(name, JOBS) or f" There are: {', '.join(JOBS)}."
            raise ConfigError(f"--only {name}: no such part.{hint}")
    return names


def _commit(given: str | None) -> str:
    """As given, or of the checkout, with a mark if it has been changed since."""
    if given:
        return given
    quiet: dict[str, Any] = {"stderr": subprocess.DEVNULL, "text": True, "timeout": 10}
    git = ["git", "-c", "safe.directory=*", "-C", str(ROOT)]
    try:
        commit = subprocess.check_output([*git, "rev-parse", "--short", "HEAD"], **quiet).strip()
        changed = subprocess.check_output([*git, "status", "--porcelain", "--", "*.py", "*.cpp"], **quiet)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return f"{commit} with changes" if changed else commit


def _leave(number: int, _: object) -> NoReturn:
    sys.exit(128 + number)
