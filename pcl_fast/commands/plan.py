"""`pcl-fast plan PRESET --gpus 8 --cores 96`: what a run on several GPUs is expected to take."""

import dataclasses
import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

import pcl_fast
from pcl_fast import atomic
from pcl_fast.commands.image_data import count_train_images, epoch_sizes
from pcl_fast.commands.settings import choose_with
from pcl_fast.config import TEST_IMAGES, TRAIN_IMAGES, Config
from pcl_fast.errors import ConfigError
from pcl_fast.profile.plan.allreduce import Cluster, exchange_of
from pcl_fast.profile.plan.basis import Basis
from pcl_fast.profile.plan.epoch import Images, Plan
from pcl_fast.profile.plan.feed import find_feed
from pcl_fast.profile.plan.gpus import find_gpu
from pcl_fast.profile.plan.rows import models_of, rows_of, sentence
from pcl_fast.profile.plan.step_time import gpu_of, projected_step, read_step
from pcl_fast.profile.roofline import StepFloor, step_floor, step_work
from pipelines.images import open_images

# Bytes of an image: 70,547,336 of the 576 photos of docs/measurements.md, converted with --max-side 500.
STORED = 70_547_336 / 576
STORED_SOURCE = "122 kB an image, as of 576 photos converted with --max-side 500; of ImageNet's not measured"


@tyro.conf.configure(tyro.conf.OmitArgPrefixes)
@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Where it is to run, and what was measured."""

    gpus: int = 8
    """GPUs of a node."""
    nodes: int = 1
    """Nodes, all alike."""
    cores: int = 96
    """Cores of a node: count what was measured (`--loaders`), whole cores or hardware threads."""
    gpu: str | None = None
    """Which: h200, h100 or a100; by default the one that `--step` was measured on, else h200."""
    network: float = 50.0
    """GB/s for each GPU, each way, between nodes: an adapter of 400 Gbit/s has 50."""
    share: float = 0.6
    """Of the fused floor, that a step which was not measured is taken to reach: 0.6 is good, 0.73 the best
    training of ResNet-50 that is known."""
    step: Path | None = None
    """A step measured on one such GPU: the JSON of `pcl-fast profile PRESET --json FILE` or `profile gpu`."""
    loaders: Path | None = None
    """Loaders measured on such a host: the JSON of `pcl-fast profile data FILE --json FILE`."""
    json: Path | None = None
    """Write every figure to this file, too."""

    def check(self) -> None:
        """Raise ConfigError for what cannot be."""
        for name in ("gpus", "nodes", "cores"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name} {getattr(self, name)}: give at least 1")
        if not (math.isfinite(self.network) and self.network > 0):
            raise ConfigError(f"--network {self.network:g}: give GB/s above 0, as 50")
        if not 0 < self.share <= 1:
            raise ConfigError(f"--share {self.share:g}: give a share of the floor above 0, up to 1, as 0.6")
        if self.gpu is not None:
            find_gpu(self.gpu)


def main(words: Sequence[str]) -> None:
    """Print a table for each method of the preset, the models behind it, and what it comes to."""
    chosen, options = choose_with("plan", _elsewhere(words), PlanOptions())
    options.check()
    if chosen.side_by_side:
        raise ConfigError("--seeds: a plan is of one run; give --seed, or nothing")
    console = Console()
    report: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["pcl-fast", "plan", *words]),
        "pcl_fast": pcl_fast.__version__,
    }
    for method, config in {run.method: run for run, _ in chosen.runs}.items():
        plan = make_plan(config, options)
        name = chosen.preset.name if len(chosen.preset.methods) == 1 else f"{chosen.preset.name} ({method})"
        console.print(table_of(plan, name))
        for line in (*models_of(plan), "", sentence(plan, name)):
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        report[method] = report_of(plan, name)
    if options.json is not None:
        atomic.write_text(options.json.expanduser(), json.dumps(report, indent=2) + "\n")


def make_plan(config: Config, options: PlanOptions) -> Plan:
    """The plan of a resolved configuration.

    Raises:
        ConfigError: for files that are not what they should be, or of another run; or too large a batch.
    """
    config = dataclasses.replace(config, ranks=options.gpus * options.nodes)
    work = step_work(config)
    measured = None if options.step is None else read_step(options.step, config, work)
    gpu = gpu_of(options.gpu, measured)
    floor = step_floor(work, gpu.ceilings_of(work.width))
    return Plan(
        config=config,
        cluster=Cluster(
            gpu=gpu,
            gpus=options.gpus,
            nodes=options.nodes,
            cores=options.cores,
            network=1e9 * options.network,
        ),
        work=work,
        floor=floor,
        step=projected_step(floor, options.share) if measured is None else measured.time,
        feed=find_feed(config, work.num_views, options.loaders),
        images=_images(config),
        pace=_pace(config, floor),
    )


def table_of(plan: Plan, name: str) -> Table:
    """A row a figure, with its basis."""
    config = plan.config
    title = (
        f"{name}: {config.model} on {config.data.dataset}, {config.train.epochs} epochs, {config.amp.dtype}"
    )
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for column in ("", "figure", "is", "from"):
        table.add_column(column, overflow="fold")
    part = None
    for row in rows_of(plan):
        if part not in (None, row.part):
            table.add_section()
        shown = "" if row.part == part else row.part
        table.add_row(f"{shown} {row.what}".strip(), row.value, row.basis.kind, row.basis.source)
        part = row.part
    return table


def report_of(plan: Plan, name: str) -> dict[str, Any]:
    """Every figure, for a JSON file: numbers in SI units, then the rows as printed."""
    cluster, feed = plan.cluster, plan.feed
    return {
        "model": plan.config.model,
        "gpu": cluster.gpu.name,
        "ranks": cluster.ranks,
        "nodes": cluster.nodes,
        "cores": cluster.cores,
        "global_batch": plan.global_batch,
        "steps_per_epoch": plan.steps_per_epoch,
        "learning_rate": plan.config.initial_lr,
        "exchange": asdict(exchange_of(plan.work, plan.config)),
        "compute_seconds": plan.step.seconds,
        "allreduce_seconds": plan.allreduce,
        "loading_seconds": plan.loading,
        "step_seconds": plan.step_seconds,
        "binds": plan.binds,
        "images_per_second": plan.images_per_second,
        "images_per_second_of_a_core": None if feed is None else feed.rate,
        "cores_needed": plan.cores_needed,
        "epoch_seconds": plan.epoch_seconds,
        "seconds_of_epochs": plan.seconds_of_epochs,
        "evaluation_seconds": plan.evaluation_seconds,
        "run_seconds": plan.run_seconds,
        "network_bytes_per_second_needed": plan.network_needed,
        "rows": [asdict(row) for row in rows_of(plan)],
        "models": list(models_of(plan)),
        "sentence": sentence(plan, name),
    }


def _elsewhere(words: Sequence[str]) -> list[str]:
    """The flags, with what is decided by the machine at hand set to what a GPU does: a plan is of another.

    Of two flags the later counts: a precision that is given stands, a device or capture does not.
    """
    for word in words[1:]:
        if word.split("=")[0] == "--ranks":
            raise ConfigError("--ranks: a plan has one for each GPU; give --gpus (of a node) and --nodes")
    if not words or words[0].startswith("-"):
        return list(words)
    return [words[0], "--amp.dtype", "bfloat16", *words[1:], "--device", "cpu", "--capture", "off"]


def _pace(config: Config, floor: StepFloor) -> tuple[float, ...]:
    """Of each epoch the floor of its step's computing over that of views of full size; empty if all are."""
    sizes = epoch_sizes(config)
    shares: dict[int, float] = {}
    for size in set(sizes):
        data = dataclasses.replace(config.data, image_size=size, resize_from=None)
        work = step_work(dataclasses.replace(config, data=data))
        shares[size] = step_floor(work, floor.ceilings).seconds["fused"] / floor.seconds["fused"]
    return tuple(shares[size] for size in sizes)


def _images(config: Config) -> Images:
    """As many as the files have that are given, else as many as the data set."""
    data, reads = config.data, config.data.backend not in ("resident", "synthetic")
    whole = count_train_images(config) or TRAIN_IMAGES[data.dataset]
    val = len(open_images(data.val).labels_N) if reads and data.val else TEST_IMAGES[data.dataset]
    stored, basis = (STORED, Basis("projected", STORED_SOURCE)) if reads else (None, None)
    if reads and data.train is not None and data.train.is_file():
        stored, basis = data.train.stat().st_size / whole, Basis("computed", f"the size of {data.train.name}")
    train = min(data.subset or whole, whole) - data.hold_out
    return Images(train=train, val=val, stored=stored, stored_basis=basis)
