"""Batches counted by one addition a step are those that nn.BatchNorm2d counts, run view by view."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pcl_fast.build import build_state
from pcl_fast.models.peers import PeerNetwork
from pcl_fast.models.split import split_network
from pcl_fast.models.zoo import Backbone, find_backbone
from tests.step.tiny import make_batches, tiny_config, train

PEERS = 3


class Twice(nn.Module):
    """Calls its norm twice, and another one once."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm, self.last = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.norm(x).relu()))


def repeating(num_classes: int) -> nn.Module:
    """Norms that are called twice in the trunk and in the branches."""
    layers = [nn.Conv2d(3, 4, 3), Twice(4), nn.Conv2d(4, 4, 3), Twice(4)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes))


BACKBONES = {
    "resnet8": find_backbone("resnet8"),
    "repeating": Backbone("repeating", repeating, "2", 32, "cifar"),
}


def counts(module: nn.Module) -> dict[str, int]:
    return {name: int(value) for name, value in module.named_buffers() if name.endswith("batches_tracked")}


def counts_view_by_view(backbone: Backbone, views: int, steps: int, joint: bool) -> dict[str, int]:
    """Of the plain network's own norms: the trunk's see each view, a branch's that of its peer."""
    parts = [split_network(backbone.build(10), backbone.split, backbone.features_at) for _ in range(PEERS)]
    for _ in range(steps):
        images = torch.randn(views, 2, 3, 8, 8)
        seen = [images.flatten(0, 1)] if joint else list(images)
        maps = [parts[0].trunk(view) for view in seen]
        for j, part in enumerate(parts):
            part.body(maps[j % len(maps)])
    found = {f"trunk.{name}": count for name, count in counts(parts[0].trunk).items()}
    for j, part in enumerate(parts):
        found |= {f"branches.{j}.{name}": count for name, count in counts(part.body).items()}
    return found


@pytest.mark.parametrize("views", [PEERS, 1])
@pytest.mark.parametrize(
    "how", [{}, {"trunk_views": "loop"}, {"bn_views": "joint"}], ids=["batched", "loop", "joint"]
)
@pytest.mark.parametrize("name", BACKBONES)
def test_counted_together_or_each_by_itself(name: str, how: dict[str, Any], views: int) -> None:
    expected = counts_view_by_view(BACKBONES[name], views, steps=2, joint="bn_views" in how)
    assert set(expected.values()) != {0}
    for together in (True, False):
        network = PeerNetwork(BACKBONES[name], 10, PEERS, **how)
        if together:
            network.count_together()
        for _ in range(2):
            network(torch.randn(views, 2, 3, 8, 8))
        assert counts(network) == expected


def test_an_evaluation_is_not_counted() -> None:
    network = PeerNetwork(BACKBONES["resnet8"], 10, PEERS)
    network.count_together()
    network(torch.randn(PEERS, 2, 3, 8, 8))
    before = counts(network)
    network.eval()(torch.randn(1, 2, 3, 8, 8))
    assert counts(network) == before
    assert set(before.values()) == {1, PEERS}


def test_counting_goes_on_from_what_was_there_and_what_is_loaded() -> None:
    network = PeerNetwork(BACKBONES["repeating"], 10, PEERS)
    images = torch.randn(PEERS, 2, 3, 8, 8)
    network(images)
    network.count_together()
    network(images)
    other = PeerNetwork(BACKBONES["repeating"], 10, PEERS)
    other.count_together()
    other.load_state_dict(copy.deepcopy(network.state_dict()))
    other(images)
    assert counts(other) == counts_view_by_view(BACKBONES["repeating"], PEERS, steps=3, joint=False)
    assert counts(network) == counts_view_by_view(BACKBONES["repeating"], PEERS, steps=2, joint=False)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("ema_bn", ["own", "copy", "ema"])
def test_a_run_counts_its_steps_in_both_networks(ema_bn: str, dtype: str) -> None:
    """In bfloat16 by kernels that do several layers at once, where they can be built."""
    state = build_state(tiny_config(dtype, ema_bn=ema_bn))
    train(state, make_batches(3))
    expected = counts_view_by_view(BACKBONES["resnet8"], PEERS, steps=3, joint=False)
    assert counts(state.network) == expected
    assert state.mean_teacher is not None
    assert counts(state.mean_teacher.network) == expected


def test_a_network_without_norms_has_nothing_to_count() -> None:
    def plain(num_classes: int) -> nn.Module:
        layers = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.AdaptiveAvgPool2d(1)]
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4, num_classes))

    network = PeerNetwork(Backbone("plain", plain, "2", 32, "cifar"), 10, PEERS)
    network.count_together()
    network(torch.randn(PEERS, 2, 3, 8, 8))
    assert counts(network) == {}
