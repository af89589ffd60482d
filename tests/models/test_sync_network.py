"""A network on several ranks, with BatchNorm over all, against the network in one process."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pcl_fast.models.peers import PeerNetwork
from pcl_fast.models.view_norm import synchronise
from pcl_fast.models.zoo import find_backbone
from tests.models.ranks import Sum, as_processes, as_threads


def make_network(**settings: Any) -> PeerNetwork:
    """Two peers of ResNet-8."""
    return PeerNetwork(find_backbone("resnet8"), 4, 2, **settings).double()


def copy_of(network: PeerNetwork, add_up: Sum | None = None) -> PeerNetwork:
    """As a rank has it, or as one process alone."""
    network = copy.deepcopy(network)
    if add_up is not None:
        synchronise(network, add_up)
    network.count_together()
    return network


def learn(network: PeerNetwork, views_VBCHW: Tensor, labels_B: Tensor) -> list[Tensor]:
    """A step: gradients of the sum of losses over the images; then one without gradients, as teachers do."""
    outputs = network(views_VBCHW)
    logits_VCB = outputs.logits_VBC.transpose(1, 2)
    labels_VB = labels_B.expand(len(logits_VCB), -1)
    loss = nn.functional.cross_entropy(logits_VCB, labels_VB, reduction="sum")
    loss = loss + nn.functional.cross_entropy(outputs.ensemble_logits_BC, labels_B, reduction="sum")
    gradients = torch.autograd.grad(loss, list(network.parameters()))
    with torch.no_grad():
        network(views_VBCHW.flip(-1))
    return list(gradients)


WAYS: list[dict[str, Any]] = [{}, {"trunk_views": "loop"}, {"bn_views": "joint"}]


def check_network(settings: dict[str, Any], sizes: tuple[int, ...], run: Callable[[int, Any], list]) -> None:
    whole = make_network(**settings)
    views_VBCHW = torch.randn(2, sum(sizes), 3, 16, 16, dtype=torch.float64)
    labels_B = torch.randint(4, (sum(sizes),))

    def rank(number: int, add_up: Sum) -> tuple[list[Tensor], list[Tensor]]:
        network = copy_of(whole, add_up)
        own = views_VBCHW.split(sizes, dim=1)[number], labels_B.split(sizes)[number]
        return learn(network, *own), list(network.buffers())

    by_rank = run(len(sizes), rank)
    alone = copy_of(whole)
    gradients = learn(alone, views_VBCHW, labels_B)
    for parts, gradient in zip(zip(*(found for found, _ in by_rank), strict=True), gradients, strict=True):
        torch.testing.assert_close(sum(parts), gradient, rtol=1e-12, atol=1e-12)
    for _, buffers in by_rank:
        for found, expected in zip(buffers, alone.buffers(), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("settings", WAYS, ids=str)
def test_a_network_on_ranks_is_the_network_on_the_whole_batch(settings):
    check_network(settings, (3, 5), as_threads)


@pytest.mark.parametrize("settings", WAYS[:2], ids=str)
def test_processes_that_add_up_by_gloo_say_the_same(settings, tmp_path: Path):
    check_network(settings, (3, 5), lambda ranks, work: as_processes(ranks, work, tmp_path))


def test_kernels_of_ours_stand_back():
    """Allowing them changes no bit where statistics are over all ranks, though they could run."""
    whole = make_network().float().to(memory_format=torch.channels_last)
    views_VBCHW = torch.randn(2, 8, 3, 16, 16).flatten(0, 1).contiguous(memory_format=torch.channels_last)
    views_VBCHW = views_VBCHW.unflatten(0, (2, 8))

    def outcome(add_up: Sum | None, kernels: bool) -> list[Tensor]:
        network = copy_of(whole, add_up)
        if kernels:
            network.use_kernels(torch.device("cpu"))
        with torch.autocast("cpu", torch.bfloat16):
            outputs = network(views_VBCHW)
        outputs.logits_VBC.float().square().sum().backward()
        gradients = [weight.grad for weight in network.parameters() if weight.grad is not None]
        return [outputs.logits_VBC.detach(), *gradients, *network.buffers()]

    found = as_threads(1, lambda rank, add_up: (outcome(add_up, True), outcome(add_up, False)))[0]
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    local = outcome(None, True), outcome(None, False)
    assert not all(torch.equal(one, other) for one, other in zip(*local, strict=True)), "the control"
