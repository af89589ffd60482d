"""The multi-branch network against plain backbones and against its own view-by-view reference."""

import copy
from importlib.util import find_spec

import pytest
import torch
from torch import nn

from pcl_fast.errors import ConfigError
from pcl_fast.models.cifar import vgg_stage
from pcl_fast.models.peers import PeerNetwork
from pcl_fast.models.zoo import Backbone, find_backbone


def images(views: int, batch: int = 3, size: int = 32, dtype=torch.float32):
    return torch.randn(views, batch, 3, size, size, dtype=dtype)


def settled(network: PeerNetwork, views_VBCHW) -> PeerNetwork:
    """After some training steps in which the running statistics have left their first values."""
    for _ in range(2):
        network(views_VBCHW)
    return network


@pytest.mark.parametrize("name", ["resnet8", "resnet20", "vgg16", "densenet40_12"])
def test_a_deployed_peer_is_the_plain_backbone(name):
    backbone = find_backbone(name)
    network = settled(PeerNetwork(backbone, 10), images(3)).eval()
    views_VBCHW = images(1)
    out = network(views_VBCHW)
    for peer in range(3):
        plain = backbone.build(10).eval()
        assert list(network.deployed_state_dict(peer)) == list(plain.state_dict())
        plain.load_state_dict(network.deployed_state_dict(peer), strict=True)
        assert torch.equal(plain(views_VBCHW[0]), out.logits_VBC[peer])


def test_the_ensemble_reads_the_concatenated_features():
    network = PeerNetwork(find_backbone("resnet8"), 10)
    out = network(images(3))
    assert [tuple(feature.shape) for feature in out.features] == 3 * [(3, 64)]
    assert out.logits_VBC.shape == (3, 3, 10)
    h_BmF = torch.cat(tuple(out.features), dim=1)
    assert isinstance(network.ensemble, torch.nn.Linear)
    expected = h_BmF @ network.ensemble.weight.T + network.ensemble.bias
    torch.testing.assert_close(out.ensemble_logits_BC, expected)
    assert PeerNetwork(find_backbone("resnet8"), 10, ensemble=False)(images(1)).ensemble_logits_BC is None


def test_each_peer_sees_its_own_view():
    network = PeerNetwork(find_backbone("resnet8"), 10).eval()
    views_VBCHW = images(3)
    before = network(views_VBCHW)
    views_VBCHW[1] += 1
    after = network(views_VBCHW)
    same = [torch.equal(a, b) for a, b in zip(before.logits_VBC, after.logits_VBC, strict=True)]
    assert same == [True, False, True]
    for peer in range(3):
        alone = network(views_VBCHW[peer : peer + 1]).logits_VBC[peer]
        torch.testing.assert_close(alone, after.logits_VBC[peer])


def test_a_single_view_runs_the_trunk_once():
    network = PeerNetwork(find_backbone("resnet8"), 10)
    seen = []
    network.trunk.register_forward_hook(lambda _m, inputs, _out: seen.append(inputs[0].shape[0]))
    network(images(1))
    network.eval()(images(1))
    network(images(3))
    assert seen == [3, 3, 9]
    assert int(network.trunk.get_buffer("stem.1.num_batches_tracked")) == 1


def test_peers_start_apart_and_share_one_trunk():
    network = PeerNetwork(find_backbone("resnet8"), 10, num_peers=2)
    first, second = network.deployed_state_dict(0), network.deployed_state_dict(1)
    assert not torch.equal(first["stage3.0.body.0.weight"], second["stage3.0.body.0.weight"])
    assert not torch.equal(first["classifier.weight"], second["classifier.weight"])
    assert first["stem.0.weight"].data_ptr() == second["stem.0.weight"].data_ptr()


def train_steps(network: PeerNetwork, batches):
    """Outputs and gradients of each step of plain gradient descent, then the buffers."""
    seen = []
    for views_VBCHW in batches:
        out = network(views_VBCHW)
        network.zero_grad()
        (out.logits_VBC.square().mean() + out.ensemble_logits_BC.square().mean()).backward()
        seen += [out.logits_VBC.detach(), *(feature.detach() for feature in out.features)]
        with torch.no_grad():
            for parameter in network.parameters():
                assert parameter.grad is not None
                seen.append(parameter.grad.clone())
                parameter.sub_(parameter.grad, alpha=0.05)
    return seen + list(network.buffers())


def narrow_vgg(num_classes: int) -> nn.Module:
    """VGG-16's stages with an eighth of its channels: float64 convolutions are slow."""
    stages = [vgg_stage(3, 8, 2), vgg_stage(8, 16, 2), vgg_stage(16, 32, 3), vgg_stage(32, 64, 3)]
    return nn.Sequential(*stages, vgg_stage(64, 64, 3), nn.Flatten(), nn.Linear(64, num_classes))


@pytest.mark.parametrize(
    ("spec", "split", "size"),
    [
        ("resnet8", None, 16),
        ("densenet40_12", None, 16),
        ("narrow_vgg", "4", 32),
        ("timm:mobilenetv3_small_050", "blocks.3", 64),
    ],
)
def test_the_batched_trunk_is_the_loop_over_views(spec, split, size):
    if spec.startswith("timm:") and find_spec("timm") is None:
        pytest.skip("timm is not installed")
    own = spec == "narrow_vgg"
    backbone = Backbone(spec, narrow_vgg, "4", 32, "cifar") if own else find_backbone(spec, split)
    batched = PeerNetwork(backbone, 4, num_peers=2).double()
    loop = PeerNetwork(backbone, 4, num_peers=2, trunk_views="loop").double()
    loop.load_state_dict(batched.state_dict(), strict=True)
    batches = [images(2, 3, size, torch.float64) for _ in range(3)]
    expected = train_steps(loop, batches)
    for found, reference in zip(train_steps(batched, batches), expected, strict=True):
        largest = reference.abs().max().item()
        torch.testing.assert_close(found, reference, rtol=0, atol=1e-8 * largest + 1e-10)


def test_joint_statistics_are_one_batch_norm_over_all_views():
    backbone = find_backbone("resnet8")
    joint = PeerNetwork(backbone, 4, bn_views="joint").double()
    own = PeerNetwork(backbone, 4).double()
    own.load_state_dict(joint.state_dict())
    views_VBCHW = images(3, dtype=torch.float64)
    expected = copy.deepcopy(joint.trunk)(views_VBCHW.flatten(0, 1))
    found = joint.run_trunk(views_VBCHW)
    torch.testing.assert_close(torch.cat(found), expected, rtol=1e-12, atol=1e-12)
    assert (torch.cat(own.run_trunk(views_VBCHW)) - expected).abs().max() > 1e-3
    assert int(joint.trunk.get_buffer("stem.1.num_batches_tracked")) == 1
    assert int(own.trunk.get_buffer("stem.1.num_batches_tracked")) == 3


class OwnNorm(nn.BatchNorm2d):
    """A BatchNorm of unknown behaviour."""


def odd_network(num_classes: int) -> nn.Module:
    layers = [
        nn.Conv2d(3, 4, 3),
        OwnNorm(4),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, num_classes),
    ]
    return nn.Sequential(*layers)


def test_a_trunk_with_an_unknown_norm_falls_back_to_the_loop():
    backbone = Backbone("odd", odd_network, "2", 32, "cifar")
    with pytest.warns(UserWarning, match="runs view by view"):
        network = PeerNetwork(backbone, 5)
    network(images(3))
    assert int(network.trunk.get_buffer("1.num_batches_tracked")) == 3


def test_channels_last_views_reach_the_trunk_without_a_copy():
    network = PeerNetwork(find_backbone("resnet8"), 10).to(memory_format=torch.channels_last)
    views_VBCHW = torch.randn(3, 2, 32, 32, 3).permute(0, 1, 4, 2, 3)
    seen = []
    network.trunk.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0]))
    maps = network.run_trunk(views_VBCHW)
    assert seen[0].data_ptr() == views_VBCHW.data_ptr()
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    assert all(m.is_contiguous(memory_format=torch.channels_last) for m in maps)


def test_bfloat16_autocast_in_channels_last_stays_near_float32():
    network = PeerNetwork(find_backbone("resnet8"), 10)
    views_VBCHW = images(3, batch=8)
    expected = copy.deepcopy(network)(views_VBCHW)
    network = network.to(memory_format=torch.channels_last)
    views_VBCHW = views_VBCHW.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    with torch.autocast("cpu", torch.bfloat16):
        out = network(views_VBCHW)
    assert out.logits_VBC.dtype == torch.bfloat16
    error = (out.logits_VBC.float() - expected.logits_VBC).abs().max()
    assert 0 < error < 0.05 * expected.logits_VBC.abs().max()
    out.ensemble_logits_BC.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in network.trunk.parameters())


def test_a_copy_is_equal_and_independent():
    network = settled(PeerNetwork(find_backbone("resnet8"), 10), images(3))
    twin = copy.deepcopy(network)
    assert twin.state_dict().keys() == network.state_dict().keys()
    views_VBCHW = images(3)
    assert torch.equal(twin(views_VBCHW).logits_VBC, network(views_VBCHW).logits_VBC)
    with torch.no_grad():
        twin.trunk.get_parameter("stem.0.weight").zero_()
    assert network.trunk.get_parameter("stem.0.weight").any()


def test_the_whole_network_compiles_into_one_graph():
    network = PeerNetwork(find_backbone("resnet8"), 10, num_peers=2).double()
    compiled = torch.compile(copy.deepcopy(network), backend="eager", fullgraph=True)
    views_VBCHW = images(2, dtype=torch.float64)
    torch.testing.assert_close(compiled(views_VBCHW).logits_VBC, network(views_VBCHW).logits_VBC)


def test_wrong_settings_are_refused():
    backbone = find_backbone("resnet8")
    for peers in (0, 9):
        with pytest.raises(ConfigError, match=f"num_peers is {peers}; it must be from 1 to 8"):
            PeerNetwork(backbone, 10, peers)
    with pytest.raises(ConfigError, match="with bn_views 'joint' use 'batched'"):
        PeerNetwork(backbone, 10, bn_views="joint", trunk_views="loop")
    with pytest.raises(ConfigError, match="2 views for 3 peers"):
        PeerNetwork(backbone, 10)(images(2))


def test_one_peer_is_a_plain_network():
    network = PeerNetwork(find_backbone("resnet8"), 10, num_peers=1, ensemble=False)
    plain = find_backbone("resnet8").build(10)
    plain.load_state_dict(network.deployed_state_dict())
    views_VBCHW = images(1)
    assert torch.equal(network(views_VBCHW).logits_VBC[0], plain(views_VBCHW[0]))
