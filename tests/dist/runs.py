"""Whole runs on one rank of several, as the command makes them, in the process that calls."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from pcl_fast.config import Config
from pcl_fast.contract import OpenData
from pcl_fast.dist import World, joined
from pcl_fast.run_folder import RunFolder
from pcl_fast.sinks import JsonlSink, Sink
from pcl_fast.trainer import Trainer
from tests.dist.parts import CPU, data_of
from tests.tiny import Watcher


class Onlooker(Watcher):
    """A sink that looks at the trainer after every step."""

    def __init__(self, look: Callable[[Trainer], None]) -> None:
        super().__init__()
        self.trainer: Trainer | None = None
        self._look = look

    def stepped(self, step: int) -> None:
        super().stepped(step)
        assert self.trainer is not None
        self._look(self.trainer)


def fitting(path: Path, config: Config, world: World) -> Config:
    """The configuration with the images a rank that the run in a folder needs."""
    batch_size = world.on_first(lambda: RunFolder(path).fitting(config).train.batch_size)
    return replace(config, train=replace(config.train, batch_size=batch_size))


def train_here(
    path: Path, config: Config, world: World, data: OpenData, sinks: Sequence[Sink] = ()
) -> Trainer:
    """Train, or go on, in a folder; returns the finished trainer."""
    folder = RunFolder(path)
    with contextlib.ExitStack() as stack:
        world.on_first(partial(_claim, folder, config, stack))
        files = [JsonlSink(folder.metrics)] if world.is_first else []
        trainer = Trainer(config, data, folder, [*files, *sinks], world)
        for sink in sinks:
            if isinstance(sink, Onlooker):
                sink.trainer = trainer
        trainer.run()
    return trainer


def _claim(folder: RunFolder, config: Config, stack: contextlib.ExitStack) -> None:
    stack.callback(folder.claim(config).close)


def train_rank(path: Path, config: Config, sinks: Sequence[Sink] = (), **data: Any) -> dict[str, Any]:
    """Join the other ranks (or nobody) and train; what was reached and how far."""
    with joined(CPU, 60) as world:
        config = fitting(path, config, world)
        trainer = train_here(path, config, world, data_of(config, world.rank, **data), sinks)
        return {"accuracies": trainer.accuracies, "steps": trainer.steps_done}
