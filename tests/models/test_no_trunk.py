"""Peers that share nothing, and what a trunk gets back from its branches."""

import copy
from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from pcl_fast.build import build_network
from pcl_fast.config import Config, PclConfig
from pcl_fast.device import resolve
from pcl_fast.kernels import conv_norm
from pcl_fast.models.peers import PeerNetwork
from pcl_fast.models.split import NO_TRUNK
from pcl_fast.models.zoo import OURS, find_backbone
from pcl_fast.objectives import make_objective

EVERY = [*OURS, "torchvision:resnet34", "torchvision:mobilenet_v3_small"]


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("spec", EVERY)
def test_every_peer_is_the_plain_backbone(spec: str) -> None:
    backbone = find_backbone(spec, NO_TRUNK)
    network = PeerNetwork(backbone, 10, 2, ensemble=False).eval()
    assert not list(network.trunk.state_dict())
    size = 32 if backbone.family == "cifar" else 64
    views_VBCHW = torch.randn(2, 2, 3, size, size)
    plain = backbone.build(10).eval()
    names = list(plain.state_dict())
    assert sum(1 for _ in network.parameters()) == 2 * sum(1 for _ in plain.parameters())
    with torch.no_grad():
        apart, alike = network(views_VBCHW), network(views_VBCHW[:1])
        for peer in range(2):
            own = network.deployed_state_dict(peer)
            assert list(own) == names
            plain.load_state_dict(own, strict=True)
            assert torch.equal(plain(views_VBCHW[peer]), apart.logits_VBC[peer])
            assert torch.equal(plain(views_VBCHW[0]), alike.logits_VBC[peer])
    weights = [dict(network.deployed_state_dict(peer)) for peer in range(2)]
    first = next(name for name, weight in weights[0].items() if weight.ndim == 4)
    assert weights[0][first].data_ptr() != weights[1][first].data_ptr()
    assert not torch.equal(weights[0][first], weights[1][first]), "they start apart, from the first layer on"


@pytest.mark.parametrize("views", [1, 3])
@pytest.mark.parametrize("trunk_views", ["batched", "loop"])
def test_in_training_they_are_plain_networks_too(views: int, trunk_views) -> None:
    """Outputs, gradients and running statistics: a peer's norms see its own view, once."""
    network = PeerNetwork(find_backbone("resnet8", NO_TRUNK), 10, 3, ensemble=False, trunk_views=trunk_views)
    network = network.double()
    network.count_together()
    plain = [find_backbone("resnet8").build(10).double() for _ in range(3)]
    for peer, each in enumerate(plain):
        each.load_state_dict(network.deployed_state_dict(peer))
    for _ in range(2):
        views_VBCHW = noise(views, 4, 3, 16, 16)
        out = network(views_VBCHW)
        out.logits_VBC.square().mean().backward()
        expected = torch.stack([each(views_VBCHW[peer % views]) for peer, each in enumerate(plain)])
        torch.testing.assert_close(out.logits_VBC, expected, rtol=1e-12, atol=1e-12)
        expected.square().mean().backward()
    for peer, each in enumerate(plain):
        own, theirs = network.deployed_state_dict(peer), each.state_dict()
        for name, buffer in each.named_buffers():
            torch.testing.assert_close(own[name], theirs[name], rtol=1e-12, atol=1e-14)
            assert buffer is not own[name]
        for name, parameter in each.named_parameters():
            parts = (network.branches[peer], network.classifiers[peer])
            (ours,) = (dict(part.named_parameters())[name] for part in parts if name in part.state_dict())
            torch.testing.assert_close(ours.grad, parameter.grad, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("method", ["vanilla", "dml", "kdcl", "pcl", "one", "okddip", "ffl", "cl"])
def test_every_method_can_train_separate_networks(method: str) -> None:
    given = Config(method=method, model="resnet8", split=NO_TRUNK, device="cpu", pcl=PclConfig(num_peers=2))
    config = resolve(given)
    objective = make_objective(config)
    network = build_network(config, objective)
    assert not list(network.trunk.parameters())
    assert network.num_peers == objective.num_peers
    out = network(torch.randn(objective.num_views, 4, 3, 32, 32))
    assert (out.ensemble_logits_BC is not None) == objective.has_ensemble


@pytest.mark.parametrize("method", ["dml", "kdcl"])
def test_networks_are_apart_unless_branches_are_asked_for(method: str) -> None:
    config = resolve(Config(method=method, model="resnet8", device="cpu"))
    assert not list(build_network(config, make_objective(config)).trunk.parameters())
    separate = getattr(config, method)
    shared = copy.copy(config)
    object.__setattr__(shared, method, type(separate)(separate=False))
    assert list(build_network(shared, make_objective(shared)).trunk.parameters())


def gradients(network: nn.Module, run: nn.Module, views: Tensor) -> dict[str, Tensor]:
    network.zero_grad()
    run(views).logits_VBC.sin().sum().backward()
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("peers", "views", "compiled"),
    [(2, 1, False), (4, 1, False), (4, 4, False), (3, 1, False), (3, 1, True)],
)
def test_a_trunk_gets_its_share_of_the_gradient(peers: int, views: int, compiled: bool) -> None:
    network = PeerNetwork(find_backbone("resnet8"), 10, peers, ensemble=False).double()
    run = torch.compile(network, backend="aot_eager", fullgraph=True) if compiled else network
    views_VBCHW = noise(views, 3, 3, 16, 16)
    before = network(views_VBCHW).logits_VBC
    whole = gradients(network, network, views_VBCHW)
    network.split_gradient = 1 / peers
    torch.testing.assert_close(run(views_VBCHW).logits_VBC, before, rtol=1e-12, atol=1e-12)
    scaled = gradients(network, run, views_VBCHW)  # pyright: ignore[reportArgumentType]
    assert scaled.keys() == whole.keys()
    for name, found in scaled.items():
        in_trunk = name.startswith("trunk.")
        expected = whole[name] / peers if in_trunk else whole[name]
        tolerance = 1e-10 if compiled or (in_trunk and peers == 3) else 0.0
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=1e-4 * tolerance)


def operations(result: Tensor) -> Counter[str]:
    """How often each differentiable operation stands behind a result."""
    seen, waiting = set(), [result.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [before for before, _ in node.next_functions]
    return Counter(node.name() for node in seen)


@pytest.mark.skipif(conv_norm.why_unavailable() is not None, reason=str(conv_norm.why_unavailable()))
@pytest.mark.parametrize("method", ["vanilla", "dml", "kdcl"])
def test_whole_networks_run_by_our_kernels_alone(method: str) -> None:
    """As a vanilla one does: the views reach every stem in the layout that its kernel takes."""
    given = Config(method=method, model="resnet8", device="cpu", channels_last="on")
    config = resolve(given)
    objective = make_objective(config)
    network = build_network(config, objective)
    views_VBCHW = torch.randn(objective.num_views, 4, 32, 32, 3).permute(0, 1, 4, 2, 3)
    with torch.autocast("cpu", torch.bfloat16):
        found = operations(network(views_VBCHW).logits_VBC)
    assert found["_ConvNormActBackward"] == objective.num_peers
    assert found["_ResidualBlocksBackward"] in range(objective.num_peers, 3 * objective.num_peers + 1)
    assert not [name for name in found if "Convolution" in name or "BatchNorm" in name]
