"""A training run of eight steps: 32 random images, ResNet-8, two peers, two epochs, on the CPU.

The real trainer, loaders, sinks and files; only the images are few and small. A run takes half a second.
"""

import contextlib
import dataclasses
import os
import resource
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from pcl_fast.config import AmpConfig, Config, PclConfig, TrainConfig
from pcl_fast.contract import EvalBatch, EvalLoader, OpenData, TrainLoader, ViewBatch
from pcl_fast.device import resolve
from pcl_fast.objectives import make_objective
from pcl_fast.run_folder import RunFolder
from pcl_fast.sinks import JsonlSink, Record, RunInfo, Sink, read_records
from pcl_fast.trainer import Trainer
from pipelines.augment import NORMALISATIONS
from pipelines.order import held_out_ids
from pipelines.resident import EvalOptions, ResidentEvalLoader, ResidentTrainLoader, TrainOptions

BATCH, STEPS_PER_EPOCH, EPOCHS = 8, 4, 2
STEPS = STEPS_PER_EPOCH * EPOCHS
IMAGE_SIZE = 16
VAL_IMAGES = 20  # two batches of 8 and one of 4


def tiny_config(**changes: Any) -> Config:
    """The resolved configuration; `train`, `pcl`, ... take dictionaries of what to change in them."""
    config = Config(
        model="resnet8",
        device="cpu",
        pcl=PclConfig(num_peers=2, ema_decay=0.7),
        train=TrainConfig(
            epochs=EPOCHS, batch_size=BATCH, eval_batch_size=BATCH, log_every=3, save_seconds=0
        ),
        amp=AmpConfig(dtype="float32"),
    )
    for key, value in changes.items():
        changed = dataclasses.replace(getattr(config, key), **value) if isinstance(value, dict) else value
        config = dataclasses.replace(config, **{key: changed})
    return resolve(config)


def tiny_data(config: Config) -> OpenData:
    """The loaders of the product over 32 random images, 20 of which are evaluated, also if held out."""
    draws = torch.Generator().manual_seed(1)
    count = STEPS_PER_EPOCH * BATCH
    images = torch.randint(0, 256, (count, 3, IMAGE_SIZE, IMAGE_SIZE), generator=draws, dtype=torch.uint8)
    labels = torch.arange(count) % 10
    options: dict[str, Any] = {
        "num_classes": 10,
        "normalisation": NORMALISATIONS["cifar10"],
        "device": torch.device("cpu"),
        "channels_last": config.channels_last == "on",
    }
    train_options = TrainOptions(
        batch_size=config.train.batch_size,
        num_views=make_objective(config).num_views,
        seed=config.seed,
        drop_last=True,
        hold_out=config.data.hold_out,
        **options,
    )
    eval_options = EvalOptions(batch_size=config.train.eval_batch_size, **options)
    val = ResidentEvalLoader(images[:VAL_IMAGES], labels[:VAL_IMAGES], eval_options)
    ids = held_out_ids(count, config.data.hold_out, config.seed)
    held_out = ResidentEvalLoader(images[ids], labels[ids], eval_options) if len(ids) else None
    return OpenData(ResidentTrainLoader(images, labels, train_options), val, held_out)


def train(
    path: Path, config: Config | None = None, sinks: Sequence[Sink] = (), data: OpenData | None = None
) -> Trainer:
    """Train (or go on) in a folder exactly as the command does, and return the finished trainer."""
    torch.set_num_threads(1)
    config = config or tiny_config()
    folder = RunFolder(path)
    lock = folder.claim(config)
    try:
        trainer = Trainer(config, data or tiny_data(config), folder, [JsonlSink(folder.metrics), *sinks])
        trainer.run()
    finally:
        lock.close()
    return trainer


class Watcher:
    """A sink that remembers what it is told; base of those that interfere."""

    def __init__(self) -> None:
        self.info: RunInfo | None = None
        self.steps: list[int] = []
        self.records: list[Record] = []
        self.messages: list[str] = []
        self.closings = 0

    def started(self, info: RunInfo) -> None:
        self.info = info

    def stepped(self, step: int) -> None:
        self.steps.append(step)

    def recorded(self, record: Record) -> None:
        self.records.append(record)

    def said(self, message: str) -> None:
        self.messages.append(message)

    def closed(self) -> None:
        self.closings += 1


class SignalAtStep(Watcher):
    """Sends this process a signal after a step (counted over the whole run), or after every one."""

    def __init__(self, step: int | None, number: signal.Signals = signal.SIGTERM) -> None:
        super().__init__()
        self.step, self.number = step, number

    def stepped(self, step: int) -> None:
        super().stepped(step)
        if self.step in (None, step):
            os.kill(os.getpid(), self.number)


@dataclass
class SignalInEvaluation:
    """An evaluation loader during whose `pass_`-th pass (1, 2, ...) the process gets SIGTERM."""

    loader: EvalLoader
    pass_: int
    passes: int = 0
    batches: int = 0

    @property
    def num_samples(self) -> int:
        return self.loader.num_samples

    def __iter__(self) -> Iterator[EvalBatch]:
        self.passes += 1
        for number, batch in enumerate(self.loader):
            self.batches += 1
            if (self.passes, number) == (self.pass_, 1):
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch


@dataclass
class Damaging:
    """A training loader that puts `value` into one view of one sample of the `step`-th batch of an epoch."""

    loader: TrainLoader
    epoch_number: int
    step: int
    view: int
    value: float = float("nan")

    @property
    def num_samples(self) -> int:
        return self.loader.num_samples

    @property
    def steps_per_epoch(self) -> int:
        return self.loader.steps_per_epoch

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[ViewBatch]:
        for number, batch in enumerate(self.loader.epoch(epoch, first_step), start=first_step + 1):
            if (epoch, number) == (self.epoch_number, self.step):
                batch.views_VBCHW[self.view, 3, 0, 5, 5] = self.value
            yield batch


@contextlib.contextmanager
def files_limited_to(size: int) -> Iterator[None]:
    """No file of this process grows beyond `size` bytes, as on a full disk: OSError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def newest_checkpoint(path: Path) -> dict[str, Any]:
    """The content of a run's newest checkpoint, read without the product."""
    newest = max((path / "checkpoints").glob("step-*.pt"))
    return torch.load(newest, weights_only=True)


def timeless(records: Sequence[Record]) -> list[Record]:
    """Records without the one thing that may differ between two equal runs."""
    return [{key: value for key, value in r.items() if key != "images_per_second"} for r in records]


def flat_tensors(value: Any, name: str = "") -> dict[str, Any]:
    """The leaves of nested dictionaries and lists, by their path."""
    if isinstance(value, dict):
        return {k: v for key, inner in value.items() for k, v in flat_tensors(inner, f"{name}/{key}").items()}
    if isinstance(value, list | tuple):
        return {k: v for i, inner in enumerate(value) for k, v in flat_tensors(inner, f"{name}/{i}").items()}
    return {name: value}


def assert_bitwise_equal(one: Any, other: Any) -> None:
    """Every tensor, number and string of two nested structures is the same, bit for bit."""
    left, right = flat_tensors(one), flat_tensors(other)
    assert left.keys() == right.keys()
    different = [key for key in left if not _same(left[key], right[key])]
    assert different == []


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return type(one) is type(other) and one == other


def assert_same_run(one: Path, other: Path) -> None:
    """Two runs ended with the same weights, EMA, buffers, momentum, progress, records and product."""
    assert_bitwise_equal(newest_checkpoint(one), newest_checkpoint(other))
    left, right = (timeless(read_records(path / "metrics.jsonl")) for path in (one, other))
    assert left == right
    assert_bitwise_equal(*(read_model(path / "model.safetensors") for path in (one, other)))


def read_model(path: Path) -> dict[str, Any]:
    """The tensors and the description in a safetensors file."""
    with safe_open(path, "pt") as file:  # pyright: ignore[reportUnknownVariableType]
        return {"tensors": {key: file.get_tensor(key) for key in file.keys()}, "about": file.metadata()}  # noqa: SIM118
