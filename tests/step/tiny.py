"""The smallest runs that still have every part: ResNet-8 on 8x8 noise, float32, by default on the CPU."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pcl_fast.build import build_state
from pcl_fast.config import AmpConfig, Config, DataConfig, PclConfig, TrainConfig
from pcl_fast.contract import OpenData, ViewBatch
from pcl_fast.device import resolve
from pcl_fast.run_folder import RunFolder
from pcl_fast.sinks import Record, RunInfo
from pcl_fast.step.state import TrainState
from pcl_fast.step.train_step import Moment, StepMetrics, train_step
from pcl_fast.trainer import Trainer
from pipelines.synthetic import SyntheticEvalLoader, SyntheticOptions, SyntheticTrainLoader

SIZE, BATCH, CLASSES, DECAY = 8, 4, 10, 0.75


def tiny_config(dtype: Any = "float32", device: str = "cpu", **pcl: Any) -> Config:
    """Six epochs, a ramp-up of four, and an EMA that reaches its ceiling at the fourth step."""
    options: dict[str, Any] = {"rampup_epochs": 4.0, "ema_decay": DECAY} | pcl
    config = Config(
        model="resnet8",
        device=device,
        amp=AmpConfig(dtype=dtype),
        data=DataConfig(backend="synthetic"),
        pcl=PclConfig(**options),
        train=TrainConfig(epochs=6, batch_size=BATCH, log_every=1, save_every=100),
    )
    return resolve(config)


def tiny_state(dtype: Any = "float32", device: str = "cpu", **pcl: Any) -> TrainState:
    """Everything a step needs, at step 0."""
    return build_state(tiny_config(dtype, device, **pcl))


def make_batches(steps: int, views: int = 3, seed: int = 1, device: str = "cpu") -> list[ViewBatch]:
    """Noise and random labels, from the seed alone."""
    draws = torch.Generator().manual_seed(seed)
    return [
        ViewBatch(
            torch.randn(views, BATCH, 3, SIZE, SIZE, generator=draws).to(device),
            torch.randint(CLASSES, (BATCH,), generator=draws).to(device),
            torch.arange(BATCH, device=device),
        )
        for _ in range(steps)
    ]


def moment(step: int, **changes: Any) -> Moment:
    """Step 1, 2, ... of a run, its EMA coefficient written out."""
    usual = Moment(step=step, lr=0.05, distill_weight=0.5, ema_coefficient=min(1 - 1 / step, DECAY))
    return dataclasses.replace(usual, **changes)


def train(state: TrainState, batches: list[ViewBatch], first_step: int = 1) -> list[StepMetrics]:
    """A step on each batch, numbered from `first_step`."""
    return [train_step(state, batch, moment(first_step + index)) for index, batch in enumerate(batches)]


def parameters(network: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter."""
    return {name: value.detach().clone() for name, value in network.named_parameters()}


def buffers(network: nn.Module) -> dict[str, Tensor]:
    """A copy of every buffer: BatchNorm's running statistics and counts."""
    return {name: value.clone() for name, value in network.named_buffers()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Bitwise, but that a zero has no sign."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class Notes:
    """A sink that keeps the records, and student and mean teacher as they were after every step."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.students: list[dict[str, Tensor]] = []
        self.teachers: list[dict[str, Tensor]] = []
        self.trainer: Trainer | None = None

    def started(self, info: RunInfo) -> None: ...

    def stepped(self, step: int) -> None:
        assert self.trainer is not None
        state = self.trainer.state
        assert state.mean_teacher is not None
        self.students.append(parameters(state.network))
        self.teachers.append(parameters(state.mean_teacher.network))

    def recorded(self, record: Record) -> None:
        self.records.append(record)

    def said(self, message: str) -> None: ...

    def closed(self) -> None: ...


def tiny_trainer(config: Config, folder: Path, steps_per_epoch: int = 2) -> tuple[Trainer, Notes]:
    """A whole run on synthetic data, and the notes it will take."""
    options = SyntheticOptions(
        num_samples=steps_per_epoch * BATCH,
        num_classes=CLASSES,
        image_size=SIZE,
        batch_size=BATCH,
        seed=1,
        device=torch.device("cpu"),
        num_views=config.pcl.num_peers,
    )
    notes = Notes()
    data = OpenData(SyntheticTrainLoader(options), SyntheticEvalLoader(options))
    notes.trainer = Trainer(config, data, RunFolder(folder), [notes])
    return notes.trainer, notes
