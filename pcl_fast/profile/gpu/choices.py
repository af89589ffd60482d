"""Choices of our own, each against what it was chosen over; several runs at once; the update in a step."""

import dataclasses
from collections.abc import Callable
from functools import partial

import torch

from pcl_fast.config import Config
from pcl_fast.profile.gpu.bench import Bench, Row
from pcl_fast.profile.gpu.engine import Engine
from pcl_fast.profile.gpu.steps import TINY_CIFAR, Network, step_config
from pcl_fast.profile.variants import variant_config
from pcl_fast.step.state import TrainState
from pcl_fast.streams import Fork

CHOSEN: tuple[Network, ...] = (("resnet32", 128), ("resnet18", 64))
UPDATED: tuple[Network, ...] = (("resnet32", 128), ("resnet18", 64), ("resnet50", 64))
SEEDS = (1, 2, 3)  # runs at once
UPDATES = 20  # in a graph

Change = Callable[[TrainState], None]


def measure_seeds(bench: Bench) -> None:
    """ResNet-32: one, two and three runs, a step of each side by side."""
    for network in bench.pick(CHOSEN[:1], TINY_CIFAR):
        for runs in SEEDS:
            configs = [_config(bench, network, seed) for seed in range(runs)]
            _measure(bench, f"{runs} together", configs, runs=runs)


def measure_choices(bench: Bench) -> None:
    """A step as it is, and with one thing done otherwise."""
    for network in bench.pick(CHOSEN, TINY_CIFAR):
        config = _config(bench, network)
        loop = dataclasses.replace(config, pcl=dataclasses.replace(config.pcl, trunk_views="loop"))
        _measure(bench, "as it is", [config])
        _measure(bench, "the trunk view by view", [loop])
        _measure(bench, "torch's kernels", [dataclasses.replace(config, kernels="off")])
        for name, change in FORKS.items():
            _measure(bench, name, [config], change)


def measure_update_share(bench: Bench) -> None:
    """The update of weights and averages within a step: its own time, and the whole step's."""
    for network in bench.pick(UPDATED, TINY_CIFAR):
        config = _config(bench, network)
        about = {"what": "update share", "model": config.model, "batch": config.train.batch_size}
        bench.attempt(about, partial(_update_share, bench, config))


def _config(bench: Bench, network: Network, seed: int = 0) -> Config:
    return variant_config(bench.best_mode, step_config(bench, network, seed=seed))


def _measure(
    bench: Bench,
    name: str,
    configs: list[Config],
    change: Change = lambda state: None,
    runs: int | None = None,
) -> None:
    first = configs[0]
    about = {"what": "seeds" if runs else "choice", "name": name, "runs": runs or 1}
    about |= {"model": first.model, "batch": first.train.batch_size}

    def measure() -> Row:
        engine = Engine(configs, change)
        try:
            seconds = bench.time(engine.step)
            engine.check()
            return {"seconds": seconds}
        finally:
            engine.close()

    bench.attempt(about, measure)


def _update_share(bench: Bench, config: Config) -> Row:
    engine = Engine([config])
    try:
        (state,) = engine.states
        step_seconds = bench.time(engine.step)
        engine.check()
        lr, phi = (torch.full((), value, dtype=torch.float64, device=bench.device) for value in (1e-3, 0.999))
        stop = torch.zeros((), device=bench.device)
        launches = 1 if bench.tiny else UPDATES
        seconds = bench.time_graph([lambda: state.arena.update(lr, phi, stop)], launches)
        norm = bench.time_graph([state.arena.gradient_norm], launches)
        weights = state.arena.buffers.values.numel()
        found = {"weights": weights, "seconds": seconds, "step_seconds": step_seconds}
        return found | {"gradient_norm_seconds": norm}
    finally:
        engine.close()


def _without(state: TrainState, teacher: bool, branches: bool) -> None:
    """Run the mean teachers after the students, or the branches one after the other, or both."""
    alone = Fork(state.arena.buffers.values.device, 0)
    if teacher:
        state.fork = alone
    if branches:
        state.network.fork = None
        if state.mean_teacher is not None:
            state.mean_teacher.network.fork = None


FORKS: dict[str, Change] = {
    "everything on one stream": partial(_without, teacher=True, branches=True),
    "branches on one stream": partial(_without, teacher=False, branches=True),
    "teachers after students": partial(_without, teacher=True, branches=False),
}
