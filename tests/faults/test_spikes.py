"""A spike of the gradient is skipped and counted, where that is wanted; what is skipped changes no weight."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pcl_fast.objectives import Loss
from pcl_fast.run_folder import RunFolder
from pcl_fast.sinks import JsonlSink, Record, read_records
from pcl_fast.step.reduction import times
from pcl_fast.trainer import Trainer
from tests.tiny import Watcher, tiny_config, tiny_data

SPIKE = 26  # the second step of the seventh epoch: the guard knows 25 norms by then


class Weights(Watcher):
    """Remembers weights and averages after each step."""

    def __init__(self) -> None:
        super().__init__()
        self.trainer: Trainer | None = None
        self.after: dict[int, tuple[Tensor, Tensor]] = {}

    def stepped(self, step: int) -> None:
        assert self.trainer is not None
        flat = self.trainer.state.arena.buffers
        assert flat.averages is not None
        self.after[step] = flat.values.clone(), flat.averages.clone()


def train_with_a_spike(path: Path, **changes: Any) -> tuple[dict[int, Record], Weights]:
    """Eight epochs, in one step of which the loss is 1,000 times as steep: its records, and the weights."""
    torch.set_num_threads(1)
    config = tiny_config(train={"epochs": 8, "log_every": 1, "save_seconds": 1000, **changes})
    folder, weights = RunFolder(path), Weights()
    trainer = weights.trainer = Trainer(
        config, tiny_data(config), folder, [JsonlSink(folder.metrics), weights]
    )
    plain, calls = trainer.objective.loss, itertools.count(1)

    def steep(*args: Any) -> Loss:
        loss = plain(*args)
        if next(calls) != SPIKE:
            return loss
        return dataclasses.replace(loss, seeds=tuple(times(loss.seeds, loss.roots, 1000)))

    trainer.objective.loss = steep  # pyright: ignore[reportAttributeAccessIssue]
    trainer.run()
    steps = [record for record in read_records(folder.metrics) if record["kind"] == "step"]
    return {record["step"]: record for record in steps}, weights


def test_a_spike_is_skipped_and_counted(tmp_path: Path) -> None:
    records, weights = train_with_a_spike(tmp_path, skip_spikes=5.0)
    usual = sorted(record["gradient_norm"] for step, record in records.items() if step < SPIKE)
    assert records[SPIKE]["gradient_norm"] > 5 * usual[len(usual) // 2], "it is one"
    assert [records[step]["skipped"] for step in (SPIKE - 1, SPIKE, SPIKE + 1, 32)] == [0, 1, 1, 1]
    for before, after in zip(weights.after[SPIKE - 1], weights.after[SPIKE], strict=True):
        assert torch.equal(before, after), "neither weights nor averages"
    for before, after in zip(weights.after[SPIKE], weights.after[SPIKE + 1], strict=True):
        assert not torch.equal(before, after), "training goes on"


def test_without_being_asked_nothing_is_skipped(tmp_path: Path) -> None:
    records, weights = train_with_a_spike(tmp_path)
    assert all("skipped" not in record for record in records.values())
    assert not torch.equal(weights.after[SPIKE - 1][0], weights.after[SPIKE][0])
