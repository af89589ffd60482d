"""`pcl-fast profile gpu`: every check and measurement of a GPU, into a JSON file and a page of markdown.

The parts run one after the other, each in a process of its own: this command again, with `--part`. The
standard library parses the flags, as a machine with a GPU may have torch and little else.
"""

import argparse
import dataclasses
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch

from pcl_fast.commands.profile.gpu_views import measure_views, open_random
from pcl_fast.commit import commit
from pcl_fast.errors import ConfigError, did_you_mean
from pcl_fast.profile.gpu import choices, device, kernels, norms, steps, suites
from pcl_fast.profile.gpu.bench import Bench
from pcl_fast.profile.gpu.found import FILE, Found
from pcl_fast.profile.gpu.report import write_section
from pcl_fast.profile.gpu.runner import Outcome, Part, add_row, run_parts

COMMAND = (sys.executable, "-m", "pcl_fast", "profile", "gpu")
MINUTES, KEPT = 8.0, Path("docs/measurements")


@dataclass(frozen=True, slots=True)
class Job:
    """What a part does, and the most seconds it may take; `rehearsed`, it has tiny sizes, too."""

    about: str
    limit: float
    run: Callable[[Bench], None]
    rehearsed: bool = True


def _compiled(limit: float, *network: steps.Network) -> Job:
    """A small network, too, takes a minute to compile on a CPU."""
    run = partial(steps.measure_compiled, networks=network)
    return Job("steps through torch.compile", limit, run, rehearsed=False)


# By worth: what does not fit into the time is not run.
JOBS: dict[str, Job] = {
    "device": Job("least times of kernels and launches; copies; products", 60, device.measure_device),
    "tests": Job("pytest -m gpu", 150, suites.run_gpu_tests),
    "paper-row": Job("steps of ResNet-32, batch 128, and of the baselines", 75, steps.measure_paper_row),
    "imagenet": Job("steps of ResNet-18 and ResNet-50", 130, steps.measure_imagenet),
    "updates": Job("the update of weights against its bytes", 40, kernels.measure_updates),
    "losses": Job("PCL's losses and gradients", 40, kernels.measure_losses),
    "norms": Job("BatchNorm, residual and ReLU", 50, norms.measure_norms),
    "cifar": Job("steps of the other networks of CIFAR", 90, steps.measure_cifar),
    "update-share": Job("the update within a step", 40, choices.measure_update_share),
    "seeds": Job("one, two and three runs side by side", 45, choices.measure_seeds),
    "choices": Job("views batched or in turn, streams, kernels", 75, choices.measure_choices),
    "views": Job("views made on the device", 40, measure_views),
    "counts": Job("kernels and launches of a step", 75, steps.count_steps),
    "compiled-resnet32": _compiled(150, ("resnet32", 128)),
    "kernel-tests": Job("the kernels' other tests, on the GPU", 75, suites.run_kernel_tests),
    "compiled-norms": Job("BatchNorm through torch.compile", 75, norms.measure_compiled_norms),
    "compiled-resnet18": _compiled(120, ("resnet18", 256)),
    "compiled-vgg16": _compiled(120, ("vgg16", 128)),
    "compiled-wrn20_8": _compiled(120, ("wrn20_8", 128)),
    "compiled-densenet40_12": _compiled(150, ("densenet40_12", 128)),
    "compiled-resnet50": _compiled(180, ("resnet50", 256)),
    "compiled-resnet110": _compiled(300, ("resnet110", 128)),
}


def main(words: Sequence[str]) -> None:
    """Measure, and keep what is found after every part; or be one of the parts."""
    asked = _parse(words)
    if asked.part is not None:
        _be_part(asked)
        return
    out = asked.out or (Path(tempfile.mkdtemp()) / "measurements" if asked.rehearse else KEPT)
    asked.out, page = out, out.with_name(out.name + ".md")
    found = Found.load(out / FILE)
    if asked.render:
        write_section(page, found)
        print(f"wrote {page}")
        return
    names = [name for name in _chosen(asked.only) if JOBS[name].rehearsed or not asked.rehearse]
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
    about = {"command": command, "commit": asked.commit or commit() or "unknown"}
    write_section(page, found)  # if it cannot be written, this is said before anything is measured
    print(f"{len(names)} parts, at most {asked.minutes:g} minutes", flush=True)

    def report(part: Part, outcome: Outcome) -> None:
        date = datetime.now(UTC).isoformat(timespec="seconds")
        found.put(part, outcome, {"date": date, **about})
        found.save(asked.out / FILE)
        _write_page(page, found)
        rows = f"{len(outcome.rows)} rows" if outcome.rows else "no rows"
        print(f"{part.name}: {outcome.status}, {outcome.seconds:.1f} s, {rows}", flush=True)
        if outcome.log:
            print(outcome.log, flush=True)

    if asked.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"  # read when a process first imports Triton
    signal.signal(signal.SIGTERM, _leave)  # so that the part that runs is ended, too
    run_parts([_part(name, asked) for name in names], 60 * asked.minutes, report)
    for line in found.troubles():
        print(f"- {line}")
    print(f"wrote {asked.out / FILE} and {page}")


def _write_page(page: Path, found: Found) -> None:
    """A page that fails does not end the measurements: it can be made from the file later."""
    try:
        write_section(page, found)
    except Exception as error:
        print(f"could not write {page} ({type(error).__name__}: {error}); --render does it later")


def _part(name: str, asked: argparse.Namespace) -> Part:
    def command(rows: Path, seconds: float) -> list[str]:
        words = [*COMMAND, "--part", name, "--rows", str(rows), "--seconds", f"{seconds:.1f}"]
        return [*words, "--out", str(asked.out), *(["--rehearse"] if asked.rehearse else [])]

    return Part(name=name, about=JOBS[name].about, limit=JOBS[name].limit, command=command)


def _be_part(asked: argparse.Namespace) -> None:
    """Measure one part, row by row into a file."""
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
    out = f"folder of {FILE}; the page is OUT.md (default: {KEPT}; for a rehearsal a temporary one)"
    parser.add_argument("--out", type=Path, help=out)
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


def _leave(number: int, _: object) -> NoReturn:
    sys.exit(128 + number)
