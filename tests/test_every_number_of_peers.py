"""Every method with every number of peers that it takes, and with networks that share nothing."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pcl_fast.build import build_state
from pcl_fast.config import (
    AmpConfig,
    ClConfig,
    Config,
    DmlConfig,
    FflConfig,
    KdclConfig,
    OkddipConfig,
    OneConfig,
    PclConfig,
)
from pcl_fast.contract import ViewBatch
from pcl_fast.device import resolve
from pcl_fast.step.train_step import Moment, train_step
from tests import naive_pcl, test_rivals_run
from tests.test_rivals_run import CASES, Case, batches, check_close, naive_of, naive_run, product_of

OPTIONS: dict[str, Callable[[int], object]] = {
    "dml": lambda m: DmlConfig(num_peers=m),
    "cl": lambda m: ClConfig(num_heads=m),
    "one": lambda m: OneConfig(num_peers=m),
    "okddip": lambda m: OkddipConfig(num_peers=m),
    "ffl": lambda m: FflConfig(num_peers=m, fusion_weight_decay=3e-2),
    "kdcl": lambda m: KdclConfig(num_peers=m),
}
RIVALS = [(name, m) for name in OPTIONS for m in range(2, 8 if name == "okddip" else 9)]


def case_of(name: str, m: int, **settings: object) -> Case:
    """The case of a method with so many peers."""
    case = CASES[name]
    return dataclasses.replace(
        case,
        peers=m + (name == "okddip"),
        views=m if case.views > 1 else 1,
        into_trunk=1 / m if name == "cl" else 1.0,
        head_peers=m,
        settings={name: OPTIONS[name](m)} | settings,
    )


def check_two_steps(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The losses of two steps are the naive implementation's, and every peer's weights after them."""
    monkeypatch.setattr(test_rivals_run, "STEPS", 2)
    state = product_of(case)
    networks, head = naive_of(case, state)
    expected = torch.stack(naive_run(case, networks, head))
    check_close(torch.stack(test_rivals_run.product_run(case, state)), expected)
    for peer, network in enumerate(networks.networks):
        own = state.network.deployed_state_dict(peer)
        for key, value in network.state_dict().items():
            check_close(own[key], value, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize(("name", "m"), RIVALS)
def test_rivals(name: str, m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    check_two_steps(case_of(name, m), monkeypatch)


@pytest.mark.parametrize("name", ["cl", "okddip", "ffl"])
def test_rivals_of_networks_that_share_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """CL's gradients are scaled where they enter what is shared: nothing."""
    case = case_of(name, 2, split="none")
    check_two_steps(dataclasses.replace(case, shares=False, into_trunk=1.0), monkeypatch)


def pcl_config(m: int, **changes: object) -> Config:
    given = Config(model="resnet8", device="cpu", amp=AmpConfig(dtype="float32"), pcl=PclConfig(num_peers=m))
    return resolve(dataclasses.replace(given, **changes))  # pyright: ignore


def one_step(config: Config, views: Tensor, labels: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
    """What peers and ensemble said before a step, and the terms of its loss; every weight has moved."""
    state = build_state(config, torch.float64)
    before = {name: value.clone() for name, value in state.network.named_parameters()}
    said = state.network(views)
    z_t = said.ensemble_logits_BC if said.ensemble_logits_BC is not None else said.logits_VBC[0]
    moment = Moment(step=1, lr=0.05, distill_weight=1.0, ema_coefficient=0.0)
    terms = train_step(state, ViewBatch(views, labels, torch.arange(len(labels))), moment).terms
    still = [name for name, value in state.network.named_parameters() if torch.equal(value, before[name])]
    assert still == []
    return list(said.logits_VBC.detach()), z_t.detach(), terms


@pytest.mark.parametrize("split", [None, "none"])
@pytest.mark.parametrize("m", range(1, 9))
def test_pcl(m: int, split: str | None) -> None:
    """At the first step mean teachers say what peers say. A peer alone has no other one's to learn from."""
    ((views, labels), *_) = batches(m)
    z, z_t, terms = one_step(pcl_config(m, split=split), views, labels)
    if m > 1:
        losses = naive_pcl.pcl_losses(z, z_t, z, labels, 0, naive_pcl.Hyper(num_peers=m, alpha=0.0))
        assert len(terms) == 3 * m + 1
        check_close(terms.sum(), losses["total"])
        return
    hard = torch.nn.functional.cross_entropy
    soft = 9 * naive_pcl.kl_divergence(z_t, z[0], 3.0)
    check_close(terms, torch.stack([hard(z[0], labels), hard(z_t, labels), soft]))


def test_one_of_networks_that_share_nothing_gates_by_the_image() -> None:
    ((views, labels), *_) = batches(1)
    config = pcl_config(3, method="one", split="none")
    z, z_e, terms = one_step(config, views, labels)
    hard = torch.nn.functional.cross_entropy
    assert build_state(config).network.ensemble.score.in_features == 3  # pyright: ignore
    expected = [hard(each, labels) for each in (*z, z_e)]
    check_close(terms, torch.stack(expected + [9 * naive_pcl.kl_divergence(z_e, each, 3.0) for each in z]))


def test_a_network_alone_is_itself_wherever_it_is_split() -> None:
    ((views, labels), *_) = batches(1)
    configs = [pcl_config(1, method="vanilla", split=at) for at in (None, "none")]
    split, whole = (one_step(config, views, labels) for config in configs)
    check_close(split[2], whole[2])
    check_close(split[0], whole[0])
