"""A run that several ranks began goes on: on as many ranks to the bit, on others where it was."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pcl_fast.build import build_state
from pcl_fast.contract import TrainLoader, ViewBatch
from pcl_fast.dist import joined
from pcl_fast.errors import Preempted
from pcl_fast.models import cifar, zoo
from pcl_fast.run_folder import RunFolder
from pcl_fast.sinks import Sink, read_records
from pcl_fast.trainer import Trainer
from tests.dist.parts import CPU, config_of, data_of, digest
from tests.dist.ranks import run_ranks, started
from tests.dist.runs import Onlooker, fitting, train_here
from tests.tiny import SignalAtStep, assert_same_run

KILLED, STOPPED = 7, 5  # after which of eight steps
OFTEN = {"save_steps": 2}
WAYS: dict[str, dict[str, Any]] = {
    "local": {"train": OFTEN},
    "sync": {"train": OFTEN, "sync_bn": True},
    "dropout": {"train": OFTEN, "model": "resnet8_with_dropout"},
}


def resnet8_with_dropout(classes: int) -> nn.Module:
    network = cifar.resnet8(classes)
    network.stage3 = nn.Sequential(nn.Dropout(0.3), network.get_submodule("stage3"))
    return network


zoo.OURS["resnet8_with_dropout"] = replace(
    zoo.OURS["resnet8"], name="resnet8_with_dropout", build=resnet8_with_dropout
)


class Noting:
    """A training loader that notes what it serves: by epoch and step, whose images."""

    def __init__(self, loader: TrainLoader) -> None:
        self._loader = loader
        self.num_samples, self.steps_per_epoch = loader.num_samples, loader.steps_per_epoch
        self.served: dict[tuple[int, int], list[int]] = {}

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[ViewBatch]:
        for step, batch in enumerate(self._loader.epoch(epoch, first_step), first_step):
            self.served[epoch, step] = batch.sample_ids_B.tolist()
            yield batch


def go(path: Path, ranks: int, changes: dict[str, Any], sinks: tuple[Sink, ...] = ()) -> dict[str, Any]:
    """Train, or go on, on this rank of so many, until the end or a signal to any of them."""
    with joined(CPU, 60) as world:
        config = fitting(path, config_of(ranks, **changes), world)
        data = data_of(config, world.rank)
        noting = Noting(data.train)
        stopped = False
        try:
            train_here(path, config, world, replace(data, train=noting), sinks)
        except Preempted:
            stopped = True
        return {"stopped": stopped, "served": noting.served}


def die(trainer: Trainer) -> None:
    """Every rank at once, without a word, amid an epoch."""
    if trainer.steps_done == KILLED:
        os._exit(9)


def go_and_die(path: Path, ranks: int, changes: dict[str, Any]) -> dict[str, Any]:
    return go(path, ranks, changes, (Onlooker(die),))


@pytest.mark.parametrize("way", WAYS)
def test_two_ranks_go_on_to_the_bit(tmp_path: Path, way: str) -> None:
    """Weights, averages, statistics, momentum, random states, running means, records, product."""
    run_ranks(tmp_path / "ranks", 2, go, [tmp_path / "straight", 2, WAYS[way]])
    killed = [tmp_path / "killed", 2, WAYS[way]]
    with started(tmp_path / "dying", 2, go_and_die, killed) as ranks:
        assert [outcome.code for outcome in ranks.wait(30)] == [9, 9]
    for found in run_ranks(tmp_path / "again", 2, go, killed):
        assert min(found["served"]) in {(0, 2), (1, 0), (1, 2)}, "from a checkpoint on"
    assert_same_run(tmp_path / "killed", tmp_path / "straight")


def draw() -> dict[str, Any]:
    """The same images through the network of each rank."""
    with joined(CPU, 60) as world:
        views_VBCHW = torch.randn(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
        found: dict[str, Any] = {"digests": []}
        for model in ("resnet8", "resnet8_with_dropout"):
            state = build_state(config_of(world.size, model=model), world=world)
            found["digests"].append(digest(state))
            with torch.no_grad():
                found[model] = state.network(views_VBCHW).logits_VBC
        return found


def test_dropout_differs_from_rank_to_rank_and_nothing_else_does(tmp_path: Path) -> None:
    first, second = run_ranks(tmp_path, 2, draw)
    assert first["digests"] == second["digests"]
    assert torch.equal(first["resnet8"], second["resnet8"])
    plain: Tensor = first["resnet8_with_dropout"]
    assert not torch.allclose(plain, second["resnet8_with_dropout"], rtol=0.01)


def alone(path: Path, changes: dict[str, Any], sinks: tuple[Sink, ...] = ()) -> dict[str, Any]:
    """The same in this process, without torchrun."""
    torch.set_num_threads(1)
    return go(path, 1, changes, sinks)


def stop_second(path: Path, ranks: int, changes: dict[str, Any]) -> dict[str, Any]:
    """The last rank gets a signal after the step `STOPPED`."""
    last = int(os.environ["RANK"]) == ranks - 1
    return go(path, ranks, changes, (SignalAtStep(STOPPED),) if last else ())


def together(parts: list[dict[str, Any]]) -> dict[tuple[int, int], list[int]]:
    """Which images all ranks served, by epoch and step, in order."""
    places = sorted({place for part in parts for place in part["served"]})
    return {place: [sample for part in parts for sample in part["served"].get(place, [])] for place in places}


def assert_goes_on(found: Path, straight: Path) -> None:
    """The same steps by the same schedules, and close to the same losses."""
    mine, theirs = (read_records(path / "metrics.jsonl") for path in (found, straight))
    exact = ("kind", "epoch", "step", "lr", "distill_weight", "ema_coefficient")
    assert [[r[key] for key in exact] for r in mine] == [[r[key] for key in exact] for r in theirs]
    assert [record["step"] for record in mine] == [3, 4, 6, 8]
    for one, other in zip(mine, theirs, strict=True):
        assert list(one["terms"].values()) == pytest.approx(list(other["terms"].values()), rel=1e-4)
        assert one["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=1e-3)


def test_one_process_ends_what_two_ranks_began(tmp_path: Path) -> None:
    """Stopped amid an epoch by a signal to the second; images are those of the undisturbed run."""
    path, straight, way = tmp_path / "run", tmp_path / "straight", {"sync_bn": True}
    whole = run_ranks(tmp_path / "ranks", 2, go, [straight, 2, way])
    begun = run_ranks(tmp_path / "begin", 2, stop_second, [path, 2, way])
    assert [part["stopped"] for part in begun] == [True, True]
    ended = alone(path, way | {"train": {"batch_size": 4}})
    assert not ended["stopped"]
    first, second, everything = together(begun), together([ended]), together(whole)
    assert [*first][:STOPPED] == [*everything][:STOPPED]
    assert [*second] == [*everything][STOPPED:]
    for place, samples in everything.items():
        served = second[place] if place in second else first[place]
        assert sorted(served) == sorted(samples)
    assert_goes_on(path, straight)
    began = RunFolder(path).read_config()
    assert (began.ranks, began.train.batch_size) == (2, 4), "what it began with"


def test_two_ranks_end_what_one_process_began(tmp_path: Path) -> None:
    path, straight, way = tmp_path / "run", tmp_path / "straight", {"sync_bn": True}
    whole = alone(straight, way)
    assert alone(path, way, (SignalAtStep(STOPPED),))["stopped"]
    ended = together(run_ranks(tmp_path / "end", 2, go, [path, 2, way | {"train": {"batch_size": 8}}]))
    everything = together([whole])
    assert ended == {place: everything[place] for place in [*everything][STOPPED:]}
    assert_goes_on(path, straight)
    began = RunFolder(path).read_config()
    assert (began.ranks, began.train.batch_size) == (1, 8)


def test_a_world_of_one_is_a_process_alone_to_the_bit(tmp_path: Path) -> None:
    """Eight times a number, divided by eight, is that number; the process alone can end its run."""
    way = {"train": OFTEN}
    alone(tmp_path / "straight", way)
    run_ranks(tmp_path / "ranks", 1, go, [tmp_path / "one", 1, way])
    assert_same_run(tmp_path / "one", tmp_path / "straight")
    (begun,) = run_ranks(tmp_path / "begin", 1, stop_second, [tmp_path / "both", 1, way])
    assert begun["stopped"]
    alone(tmp_path / "both", way)
    assert_same_run(tmp_path / "both", tmp_path / "straight")
