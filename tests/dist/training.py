"""A training on several ranks by the product's own command, from .beton files, and faults to put into it."""

import functools
import importlib
import os
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pcl_fast.contract import ViewBatch
from tests.datasets_prep.pictures import convert_folder, write_folder
from tests.dist.ranks import Outcome, Ranks, command, started

BATCH, STEPS_PER_EPOCH, EPOCHS = 4, 3, 2
STEPS = STEPS_PER_EPOCH * EPOCHS
SETTINGS = shlex.split(
    "train imagenet-r18 --model resnet8 --pcl.num-peers 2 --data.backend torch --data.workers 0 "
    f"--data.image-size 16 --train.eval-batch-size 1 --train.log-every 1 --train.epochs {EPOCHS} "
    "--train.save-seconds 0 --device cpu --amp.dtype float32 --kernels off"
)


def write_photos(folder: Path) -> Path:
    """A folder with train.beton and val.beton: three classes, 14 and 11 pictures."""
    for split, images in (("train", STEPS_PER_EPOCH * BATCH + 2), ("val", 11)):
        write_folder(folder / split, images=images)
        convert_folder(folder / split, folder / f"{split}.beton")
    return folder


def training(photos: Path, run: Path, *more: str, ranks: int = 2) -> list[str]:
    """The words of the command that trains in `run`, on so many ranks."""
    data = ["--data.train", f"{photos}/train.beton", "--data.val", f"{photos}/val.beton"]
    return [*SETTINGS, *data, "--train.batch-size", str(BATCH // ranks), "--run-dir", str(run), *more]


@dataclass(frozen=True)
class Fault:
    """On one rank, `deed` is done before the `call`-th call of a function, as `module:Class.method`."""

    rank: int
    place: str
    deed: Callable[[], Any]
    call: int = 1

    def install(self) -> None:
        """Lie in wait."""
        module, _, path = self.place.partition(":")
        *owners, name = path.split(".")
        owner = functools.reduce(getattr, owners, importlib.import_module(module))
        before, calls = getattr(owner, name), 0

        @functools.wraps(before)
        def call(*args: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == self.call:
                self.deed()
            return before(*args, **options)

        setattr(owner, name, call)


OPENING = "pcl_fast.commands.train:opened_data"
RESTORING = "pcl_fast.keeper:Keeper.restore"
LOADER = "pcl_fast.step.feed:HostFeed.advance"  # called once more at the end of an epoch
STEP = "pcl_fast.step.device_step:DeviceStep.__call__"
EVALUATION = "pcl_fast.trainer:Trainer._leave_evaluation"  # before each batch: 6 an epoch on the first rank
SAVING = "pcl_fast.keeper:Keeper.save"
WRITING = "pcl_fast.checkpoint:CheckpointStore.save"  # the first rank's thread
SINK = "pcl_fast.sinks:JsonlSink.recorded"  # of the first rank


def get_signal(*numbers: int) -> None:
    """This process is sent signals, one after the other."""
    for number in numbers:
        os.kill(os.getpid(), number)


def fail_by(error: Exception) -> None:
    """A fault of any kind."""
    raise error


def sleep(seconds: float) -> None:
    """A hang that ends."""
    time.sleep(seconds)


def poison_batch(number: int) -> None:
    """From now on, the batch of this number (from 1, within this process) has a view with a NaN in it."""
    from pcl_fast.step.feed import HostFeed

    take, left = HostFeed.take, [number]

    def poisoned(feed: HostFeed) -> ViewBatch:
        batch = take(feed)
        left[0] -= 1
        if left[0] == 0:
            batch.views_VBCHW[1, 0, 0, 3, 3] = float("nan")
        return batch

    HostFeed.take = poisoned  # type: ignore[method-assign]


def faulty(words: Sequence[str], faults: Sequence[Fault]) -> None:
    """The command, in a rank where a fault may lie in wait."""
    for fault in faults:
        if fault.rank == int(os.environ["RANK"]):
            fault.install()
    command(words)


def without_an_agent(port: int, words: Sequence[str], faults: Sequence[Fault]) -> None:
    """As `faulty`, but the first rank holds the store, as where ranks are started by hand."""
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
    os.environ["MASTER_PORT"] = str(port)
    faulty(words, faults)


def start(folder: Path, words: Sequence[str], *faults: Fault, ranks: int = 2) -> Any:
    """Ranks that train, within a block."""
    return started(folder, ranks, faulty, (list(words), faults))


def run(
    folder: Path, words: Sequence[str], *faults: Fault, ranks: int = 2, seconds: float = 50
) -> list[Outcome]:
    """How the ranks of a training have ended."""
    begun: Ranks
    with start(folder, words, *faults, ranks=ranks) as begun:
        return begun.wait(seconds)


def codes(outcomes: Sequence[Outcome]) -> list[int]:
    """Their exit codes."""
    return [outcome.code for outcome in outcomes]


def said(outcomes: Sequence[Outcome]) -> str:
    """All that they said, for the message of an assertion."""
    return "".join(f"--- rank {n}\n{o.out}{o.err}" for n, o in enumerate(outcomes))
