"""Fifty steps of the product equal those of an independent, naive, view-by-view implementation in float64."""

import dataclasses
import functools

import pytest
import torch
from torch import Tensor, nn

from pcl_fast.build import build_state
from pcl_fast.config import Config, DataConfig, OptimConfig, PclConfig, TrainConfig
from pcl_fast.contract import ViewBatch
from pcl_fast.device import resolve
from pcl_fast.schedules import ema_coefficient, learning_rate, rampup_weight
from pcl_fast.step.state import TrainState
from pcl_fast.step.train_step import Moment, train_step
from tests import naive_pcl

PEERS, BATCH, SIZE, CLASSES, STEPS, EPOCHS = 3, 4, 12, 10, 50, 10
HYPER = naive_pcl.Hyper(num_peers=PEERS, alpha=4.0, ema_decay=0.95, milestones=(5, 8))


def make_config(**pcl: object) -> Config:
    config = Config(
        model="resnet8",
        device="cpu",
        data=DataConfig(dataset="cifar10"),
        pcl=PclConfig(num_peers=PEERS, rampup_epochs=4.0, ema_decay=0.95),
        optim=OptimConfig(milestones=(5 / EPOCHS, 8 / EPOCHS)),
        train=TrainConfig(epochs=EPOCHS, batch_size=BATCH),
    )
    config = dataclasses.replace(config, amp=dataclasses.replace(config.amp, dtype="float32"))
    return resolve(dataclasses.replace(config, pcl=dataclasses.replace(config.pcl, **pcl)))


def in_float64(config: Config) -> TrainState:
    """The product's state at step 0, everything in float64."""
    return build_state(config, torch.float64)


def copy_in_order(source: nn.Module, target: nn.Module) -> None:
    """Parameters of one implementation into the other's, both in their order of registration."""
    with torch.no_grad():
        for theirs, ours in zip(source.parameters(), target.parameters(), strict=True):
            assert theirs.shape == ours.shape
            ours.copy_(theirs)


def make_batches(views: int = PEERS) -> list[tuple[Tensor, Tensor]]:
    draws = torch.Generator().manual_seed(7)
    return [
        (
            torch.randn(views, BATCH, 3, SIZE, SIZE, generator=draws, dtype=torch.float64),
            torch.randint(CLASSES, (BATCH,), generator=draws),
        )
        for _ in range(STEPS)
    ]


def product_moment(config: Config, step: int, epoch: int) -> Moment:
    assert config.pcl.rampup_epochs is not None
    optim = config.optim
    return Moment(
        step=step,
        lr=learning_rate(optim.lr, epoch, EPOCHS, optim.milestones, optim.gamma),
        distill_weight=rampup_weight(epoch, config.pcl.distill_weight, config.pcl.rampup_epochs),
        ema_coefficient=ema_coefficient(step, config.pcl.ema_decay),
    )


def product_run(
    state: TrainState, config: Config, batches: list[tuple[Tensor, Tensor]], epochs: list[int]
) -> list[Tensor]:
    history: list[Tensor] = []
    for step, ((views, labels), epoch) in enumerate(zip(batches, epochs, strict=True), start=1):
        batch = ViewBatch(views, labels, torch.arange(len(labels)))
        history.append(train_step(state, batch, product_moment(config, step, epoch)).terms)
    return history


def assert_same_network(ours: nn.Module, theirs: nn.Module) -> None:
    """Parameters, and BatchNorm's running statistics, in order of registration."""
    pairs = [*zip(ours.parameters(), theirs.parameters(), strict=True)]
    pairs += [*zip(ours.buffers(), theirs.buffers(), strict=True)]
    for mine, other in pairs:
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-8)


Run = tuple[list[dict[str, Tensor]], naive_pcl.NaivePCL, naive_pcl.NaivePCL]


def make_epochs() -> list[int]:
    return [step * EPOCHS // STEPS for step in range(STEPS)]


@functools.cache
def naive_run() -> Run:
    """From the product's first weights: loss terms, model and mean teacher; the same for every test."""
    naive = naive_pcl.NaivePCL(1, CLASSES, PEERS).double()
    copy_in_order(in_float64(make_config()).network, naive)
    return naive_pcl.naive_train(naive, make_batches(), make_epochs(), HYPER)


@pytest.mark.parametrize("trunk_views", ["batched", "loop"])
def test_fifty_pcl_steps_equal_the_naive_implementation(trunk_views: str) -> None:
    """Every loss term of every step, and student, mean teacher and running statistics after the last."""
    config = make_config(trunk_views=trunk_views)
    state = in_float64(config)
    terms = product_run(state, config, make_batches(), make_epochs())
    history, naive, naive_teacher = naive_run()

    for ours, theirs in zip(terms, history, strict=True):
        torch.testing.assert_close(ours[:PEERS], theirs["ce_peers"], rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(ours[PEERS], theirs["ce_ensemble"], rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(ours[PEERS + 1 : 2 * PEERS + 1].sum(), theirs["pe"], rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(ours[2 * PEERS + 1 :].sum(), theirs["pm"], rtol=1e-6, atol=1e-9)
    assert state.mean_teacher is not None
    assert_same_network(state.network, naive)
    assert_same_network(state.mean_teacher.network, naive_teacher)


def test_fifty_vanilla_steps_equal_ordinary_training() -> None:
    """One network on one view: no trace of peers, ensembles or averages."""
    config = dataclasses.replace(make_config(), method="vanilla")
    state = in_float64(config)
    naive = naive_pcl.NaiveResNet(1, CLASSES).double()
    copy_in_order(state.network, naive)
    batches, epochs = make_batches(views=1), make_epochs()
    terms = product_run(state, config, batches, epochs)
    optimizer = naive_pcl.make_optimizer(naive, HYPER)
    for ours, (views, labels), epoch in zip(terms, batches, epochs, strict=True):
        theirs = naive_pcl.naive_vanilla_step(naive, optimizer, views[0], labels, epoch, HYPER)
        torch.testing.assert_close(ours.sum(), theirs["total"], rtol=1e-7, atol=1e-9)
    assert_same_network(state.network, naive)
