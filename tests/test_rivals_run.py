"""Ten steps of every method equal those of a naive, peer-by-peer implementation in float64."""

import copy
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from pcl_fast.build import build_state
from pcl_fast.config import AmpConfig, ClConfig, Config, DmlConfig, FflConfig, KdclConfig, PclConfig
from pcl_fast.contract import ViewBatch
from pcl_fast.device import resolve
from pcl_fast.models.zoo import find_backbone
from pcl_fast.step.state import TrainState
from pcl_fast.step.train_step import Moment, train_step
from tests import naive_pcl, naive_rivals
from tests.naive_rivals import NaivePeers, Said

BATCH, SIZE, STEPS = 4, 12, 10
LossOf = Callable[[Said, Tensor, float], Tensor]
check_close = functools.partial(torch.testing.assert_close, rtol=1e-7, atol=1e-9)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A method's settings, and what the naive implementation does in its place."""

    method: str
    loss: LossOf
    peers: int = 3
    shares: bool = True
    views: int = 1
    into_trunk: float = 1.0
    head: Callable[[int], nn.Module] | None = None
    head_peers: int = 3
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)


RIVALS = naive_rivals
CASES = {
    "vanilla": Case(method="vanilla", loss=RIVALS.vanilla, peers=1),
    "dml": Case(method="dml", loss=RIVALS.dml, shares=False),
    "dml branches": Case(
        method="dml", loss=RIVALS.dml, peers=2, settings={"dml": DmlConfig(separate=False, num_peers=2)}
    ),
    "cl": Case(method="cl", loss=RIVALS.cl, into_trunk=1 / 3),
    "cl of 2": Case(
        method="cl", loss=RIVALS.cl, peers=2, into_trunk=1 / 2, settings={"cl": ClConfig(num_heads=2)}
    ),
    "one": Case(method="one", loss=RIVALS.one, head=RIVALS.Gate),
    "okddip": Case(method="okddip", loss=RIVALS.okddip, peers=4, head=RIVALS.Attention),
    "ffl": Case(
        method="ffl",
        loss=RIVALS.ffl,
        head=RIVALS.Fusion,
        settings={"ffl": FflConfig(fusion_weight_decay=3e-2)},
    ),
    "kdcl": Case(method="kdcl", loss=RIVALS.kdcl_minlogit, shares=False, views=3),
    "kdcl naive": Case(
        method="kdcl",
        loss=RIVALS.kdcl_naive,
        views=3,
        settings={"kdcl": KdclConfig(target="naive", separate=False)},
    ),
}


def product_of(case: Case) -> TrainState:
    """The product's state at step 0, everything in float64."""
    config = Config(method=case.method, model="resnet8", device="cpu", pcl=PclConfig(rampup_epochs=4.0))
    amp = dataclasses.replace(config.amp, dtype="float32")
    return build_state(resolve(dataclasses.replace(config, amp=amp, **case.settings)), torch.float64)


def naive_of(case: Case, state: TrainState) -> tuple[NaivePeers, nn.Module | None]:
    """The naive networks and head, with the product's first weights."""
    plain = [find_backbone("resnet8").build(10).double() for _ in range(case.peers)]
    for peer, network in enumerate(plain):
        network.load_state_dict(state.network.deployed_state_dict(peer))
    head = case.head(case.head_peers).double() if case.head else None
    if head is not None:
        assert isinstance(state.network.ensemble, nn.Module)
        copy_in_order(state.network.ensemble, head)
    return NaivePeers(plain, case.shares, case.into_trunk).train(), head


def copy_in_order(source: nn.Module, target: nn.Module) -> None:
    with torch.no_grad():
        for theirs, ours in zip(source.parameters(), target.parameters(), strict=True):
            ours.copy_(theirs)


def batches(views: int) -> list[tuple[Tensor, Tensor]]:
    draws = torch.Generator().manual_seed(3)
    return [
        (
            torch.randn(views, BATCH, 3, SIZE, SIZE, generator=draws, dtype=torch.float64),
            torch.randint(10, (BATCH,), generator=draws),
        )
        for _ in range(STEPS)
    ]


def schedule(step: int) -> tuple[float, float]:
    """The learning rate and w(e), which rises, of a step."""
    return 0.05 if step <= 6 else 0.005, 0.1 * step


def naive_run(case: Case, networks: NaivePeers, head: nn.Module | None) -> list[Tensor]:
    """The losses of all steps; torch's own SGD, with a group for a head that decays otherwise."""
    groups: list[dict[str, Any]] = [{"params": list(networks.parameters())}]
    if head is not None:
        decay = 3e-2 if case.method == "ffl" else 5e-4
        groups.append({"params": list(head.parameters()), "weight_decay": decay})
    optimizer = SGD(groups, lr=1.0, momentum=0.9, weight_decay=5e-4, nesterov=True)
    losses: list[Tensor] = []
    for step, (views, labels) in enumerate(batches(case.views), start=1):
        lr, weight = schedule(step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        trunk_map, maps, h, z = networks(views)
        loss = case.loss(Said(trunk_map, maps, h, z, head), labels, weight)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def product_run(case: Case, state: TrainState) -> list[Tensor]:
    losses: list[Tensor] = []
    for step, (views, labels) in enumerate(batches(case.views), start=1):
        lr, weight = schedule(step)
        moment = Moment(step=step, lr=lr, distill_weight=weight, ema_coefficient=0.5)
        terms = train_step(state, ViewBatch(views, labels, torch.arange(BATCH)), moment).terms
        assert len(terms) == len(state.objective.term_names)
        losses.append(terms.sum())
    return losses


@pytest.mark.parametrize("name", CASES)
def test_ten_steps_equal_the_naive_implementation(name: str) -> None:
    """The loss of every step; all weights and running statistics after the last; what is deployed."""
    case = CASES[name]
    state = product_of(case)
    networks, head = naive_of(case, state)
    expected = torch.stack(naive_run(case, networks, head))
    torch.testing.assert_close(torch.stack(product_run(case, state)), expected, rtol=1e-8, atol=1e-10)
    for peer, network in enumerate(networks.networks):
        own = state.network.deployed_state_dict(peer)
        for key, value in network.state_dict().items():
            check_close(own[key], value, msg=lambda m, k=key: f"{k}: {m}")
    if head is not None:
        assert isinstance(state.network.ensemble, nn.Module)
        pairs = [*zip(state.network.ensemble.parameters(), head.parameters(), strict=True)]
        pairs += [*zip(state.network.ensemble.buffers(), head.buffers(), strict=True)]
        for ours, theirs in pairs:
            check_close(ours, theirs)
    deployed = networks.networks[-1 if case.method == "okddip" else 0].state_dict()
    for key, value in state.deployed_tensors().items():
        if key in deployed:  # a later branch has its own layers only
            check_close(value, deployed[key])


def check_pcl(state: TrainState, student: NaivePeers, steps: int) -> None:
    """Train PCL beside naive networks of the same weights: losses, and all they share, stay the same.

    The mean teachers' running statistics are of their own batches.
    """
    peers = len(student.networks)
    assert isinstance(state.network.ensemble, nn.Module)
    width = sum(p.numel() for p in state.network.ensemble.parameters() if p.dim() > 1) // 10
    ensemble = nn.Linear(width, 10).double()
    copy_in_order(state.network.ensemble, ensemble)
    learns = nn.ModuleList([student, ensemble])
    teachers = copy.deepcopy(learns).requires_grad_(False)
    optimizer = SGD(learns.parameters(), 0.05, 0.9, weight_decay=5e-4, nesterov=True)
    hyper = naive_pcl.Hyper(num_peers=peers, alpha=0.0)  # no ramp: w(e) = 1
    for step, (views, labels) in enumerate(batches(peers)[:steps], start=1):
        _, _, h, z = student(views)
        q = teachers[0](views)[3]
        losses = naive_pcl.pcl_losses(z, ensemble(torch.cat(h, dim=1)), q, labels, 0, hyper)
        optimizer.zero_grad()
        losses["total"].backward()
        optimizer.step()
        phi = min(1 - 1 / step, 0.6)
        with torch.no_grad():
            for average, weight in zip(teachers.parameters(), learns.parameters(), strict=True):
                average.copy_(phi * average + (1 - phi) * weight)
        moment = Moment(step=step, lr=0.05, distill_weight=1.0, ema_coefficient=phi)
        terms = train_step(state, ViewBatch(views, labels, torch.arange(BATCH)), moment).terms
        check_close(terms.sum(), losses["total"].detach())
        check_close(terms[:peers], losses["ce_peers"].detach())
    assert state.mean_teacher is not None
    for network, (naive, classifier) in ((state.network, learns), (state.mean_teacher.network, teachers)):
        assert isinstance(naive, NaivePeers)
        assert isinstance(network.ensemble, nn.Linear)
        check_close(network.ensemble.weight, classifier.weight)
        for peer, each in enumerate(naive.networks):
            own = network.deployed_state_dict(peer)
            for key, value in each.state_dict().items():
                check_close(own[key], value, msg=lambda m, k=key: f"{k}: {m}")


def test_pcl_of_separate_networks_equals_plain_networks_side_by_side() -> None:
    """Ten steps: losses, networks, ensemble classifier, and mean teachers with statistics of their own."""
    config = Config(model="resnet8", split="none", device="cpu", amp=AmpConfig(dtype="float32"))
    state = build_state(resolve(config), torch.float64)
    student, _ = naive_of(Case(method="pcl", loss=RIVALS.vanilla, shares=False, views=3), state)
    check_pcl(state, student, steps=10)
