"""Peers of different backbones on one trunk: what each is, and which of them go together."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pcl_fast.build import build_network, build_state, count_operations
from pcl_fast.config import Config, OkddipConfig
from pcl_fast.device import resolve
from pcl_fast.errors import ConfigError
from pcl_fast.models.network_operations import network_operations
from pcl_fast.models.peers import PeerNetwork
from pcl_fast.models.zoo import Backbone, find_backbone
from pcl_fast.objectives import make_objective


def config_of(model: str, method: str = "pcl", split: str | None = None, **changes: object) -> Config:
    return resolve(Config(model=model, method=method, split=split, device="cpu", **changes))  # pyright: ignore


def network_of(model: str, method: str = "pcl", split: str | None = None) -> PeerNetwork:
    config = config_of(model, method, split)
    return build_network(config, make_objective(config))


def settle(network: PeerNetwork) -> None:
    """Running statistics that are not those of a new network."""
    for name, buffer in network.named_buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5) if "var" in name else buffer.normal_()


def images() -> Tensor:
    return torch.randn(3, 3, 32, 32)


def flops_of(network: nn.Module) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.eval()(torch.zeros(1, 3, 32, 32))
    return counter.get_total_flops()


def on_the_trunk_of(first: str, name: str) -> nn.Module:
    """A plain network with the layers before stage3 of another one."""
    network, trunk = find_backbone(name).build(10), find_backbone(first).build(10)
    for part in ("stem", "stage1", "stage2"):
        setattr(network, part, trunk.get_submodule(part))
    return network.eval()


def test_every_peer_is_its_backbone_on_the_trunk_of_the_first() -> None:
    names = ("resnet8", "resnet20", "resnet8")
    network = network_of(",".join(names)).eval()
    settle(network)
    said = network(images_BCHW := images()[None])
    for peer, name in enumerate(names):
        plain = on_the_trunk_of("resnet8", name)
        plain.load_state_dict(network.deployed_state_dict(peer))
        torch.testing.assert_close(plain(images_BCHW[0]), said.logits_VBC[peer])
    first = find_backbone("resnet8").build(10)
    assert list(network.deployed_state_dict(0)) == list(first.state_dict())


def test_whole_networks_of_any_kind_go_together() -> None:
    """Each loads into its plain backbone; the ensemble looks at all features, however wide."""
    names = ("resnet8", "densenet40_12", "vgg16")
    network = network_of(",".join(names), split="none").eval()
    settle(network)
    network.double()
    said = network(images_BCHW := images()[None].double())
    for peer, name in enumerate(names):
        plain = find_backbone(name).build(10).eval().double()
        plain.load_state_dict(network.deployed_state_dict(peer))
        torch.testing.assert_close(plain(images_BCHW[0]), said.logits_VBC[peer])
    assert isinstance(network.ensemble, nn.Linear)
    assert [feature.shape[1] for feature in said.features] == [64, 132, 512]
    expected = network.ensemble(torch.cat(list(said.features), dim=1))
    torch.testing.assert_close(said.ensemble_logits_BC, expected)


def test_one_name_for_all_is_what_it_was() -> None:
    one, listed = network_of("resnet8"), network_of("resnet8, resnet8,resnet8")
    for key, value in one.state_dict().items():
        assert torch.equal(value, listed.state_dict()[key])


@pytest.mark.parametrize(
    ("model", "changes", "says"),
    [
        (
            "resnet8,resnet20",
            {},
            r"--model resnet8,resnet20: 2 backbones for the 3 peers of --method pcl; give",
        ),
        ("resnet8,resnet20", {"method": "vanilla"}, "2 backbones for the one network of --method vanilla"),
        ("resnet8,resnet20", {"method": "kd"}, "2 backbones for the one network of --method kd"),
        (
            "resnet8,resnet8,resnet110",
            {},
            "peer 3, resnet110, goes on from a trunk's 128 x 16 x 16, and that of resnet8 makes 32 x 16 x 16",
        ),
        ("resnet8,resnet8,resnet8,resnet20", {"method": "okddip"}, "deploys peer 4, .* one backbone, or"),
        (
            "resnet8,densenet40_12,vgg16",
            {"method": "ffl", "split": "none"},
            r"--method ffl: it fuses maps of one size, and the branches' are 8 x 8, 8 x 8, 2 x 2; give",
        ),
        (
            "resnet8,resnet8,densenet40_12,resnet8",
            {"method": "okddip", "split": "none"},
            r"features are 64, 64, 132, 64 wide, and what this method .* one width",
        ),
        ("resnet8,resnet9,resnet8", {}, "backbone 'resnet9' is unknown. Did you mean"),
    ],
)
def test_what_does_not_go_together_is_one_line(model: str, changes: dict[str, str], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        network_of(model, **changes)
    assert "\n" not in str(caught.value)


def test_names_that_two_backbones_use_for_different_layers_are_refused() -> None:
    """Both trunks make maps alike, but the second network has its branch where the first has its trunk."""

    def shallow(classes: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(4 * 16, classes))

    def deep(classes: int) -> nn.Module:
        trunk = (nn.Conv2d(3, 4, 2), nn.Conv2d(4, 4, 2))
        return nn.Sequential(*trunk, nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(4 * 16, classes))

    pair = (Backbone("deep", deep, "2", 8, "cifar"), Backbone("shallow", shallow, "1", 8, "cifar"))
    with pytest.raises(ConfigError, match=r"peer 2, shallow, has a '1.weight' of its own behind a trunk"):
        PeerNetwork(pair, 10, 2)


def test_maps_of_other_widths_fuse_where_they_are_of_one_size() -> None:
    network = network_of("resnet8,densenet40_12,resnet110", "ffl", "none").train()
    said = network(images()[None])
    assert said.ensemble_logits_BC is not None
    assert said.ensemble_logits_BC.shape == (3, 10)


@pytest.mark.parametrize(
    ("model", "method", "split"),
    [
        ("resnet8,resnet20,resnet8", "pcl", None),
        ("resnet8,vgg16,densenet40_12", "pcl", "none"),
        ("resnet8,resnet20,resnet32", "one", None),
        ("resnet8,resnet20,resnet32,resnet20", "okddip", "none"),
    ],
)
def test_parameters_and_operations_are_those_of_all(model: str, method: str, split: str | None) -> None:
    config = config_of(model, method, split)
    objective = make_objective(config)
    network, found = build_network(config, objective), count_operations(config, objective)
    assert found.peer_parameters(objective.num_peers, objective.has_ensemble) == sum(
        parameter.numel() for parameter in network.parameters()
    )
    names = model.split(",")
    plain = find_backbone(names[objective.deployment.peer]).build(10)
    assert found.parameters == sum(parameter.numel() for parameter in plain.parameters())
    assert found.forward_flops == flops_of(plain)
    own = [flops_of(find_backbone(name).build(10)) for name in names]
    if split == "none":
        assert sum(times * each.flops for each, times in found.of_peers(len(names))) == sum(own)
    twins = network_operations(find_backbone("resnet8"), 10, 32)
    assert sum(each.flops for each in found.trunk) == (0 if split else sum(e.flops for e in twins.trunk))


def test_a_leader_of_another_backbone_is_deployed_whole() -> None:
    peers = OkddipConfig(num_peers=2)
    config = config_of("resnet8,resnet8,resnet20", "okddip", "none", okddip=peers)
    state = build_state(config)
    plain = find_backbone("resnet20").build(10)
    plain.load_state_dict(state.deployed_tensors())
    images_BCHW = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        says_BC = state.network.eval()(images_BCHW[None]).logits_VBC[2]
        torch.testing.assert_close(plain.eval()(images_BCHW), says_BC, rtol=1e-4, atol=1e-5)
