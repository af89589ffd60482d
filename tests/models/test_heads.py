"""Heads over all peers inside the real network, recomputed from its layers and from plain networks."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcl_fast.config import OneConfig
from pcl_fast.contract import HeadOutputs, HeadShapes, MakeHead, PeerHead, PeerParts
from pcl_fast.errors import ConfigError
from pcl_fast.kernels import conv_norm
from pcl_fast.models.peers import PeerNetwork
from pcl_fast.models.view_norm import ViewBatchNorm2d
from pcl_fast.models.zoo import Backbone, find_backbone
from pcl_fast.objectives.ffl import Fusion
from pcl_fast.objectives.okddip import Attention
from pcl_fast.objectives.one import Gate, NativeEnsemble

PEERS, CLASSES = 3, 7
HEADS: list[MakeHead] = [Gate, Attention, Fusion]


class Recorder(PeerHead):
    """A head that keeps what it was shown."""

    wants_maps = True

    def __init__(self, shapes: HeadShapes) -> None:
        super().__init__()
        self.shapes = shapes
        self.seen: PeerParts | None = None

    def forward(self, parts: PeerParts) -> HeadOutputs:
        self.seen = parts
        return HeadOutputs(torch.stack(tuple(parts.logits)).mean(0))


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def network_with(make: MakeHead, backbone: str = "resnet8") -> PeerNetwork:
    """In float64, with norms that have left their first values."""
    network = PeerNetwork(find_backbone(backbone), CLASSES, PEERS, ensemble=make).double()
    with torch.no_grad():
        for layer in network.modules():
            if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
                layer.weight.uniform_(0.5, 1.5)
                layer.bias.uniform_(-0.5, 0.5)
                assert layer.running_mean is not None
                assert layer.running_var is not None
                layer.running_mean.uniform_(-0.5, 0.5)
                layer.running_var.uniform_(0.5, 1.5)
    return network


def peers_of(network: PeerNetwork, view: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The trunk's map, each branch's features and each classifier's logits, part by part."""
    trunk_map = network.trunk(view)
    made = [branch(trunk_map) for branch in network.branches]
    features = [each[0] if isinstance(each, tuple) else each for each in made]
    return trunk_map, features, [f(h) for f, h in zip(network.classifiers, features, strict=True)]


def normalised(x: Tensor, norm: nn.BatchNorm1d | nn.BatchNorm2d, training: bool) -> Tensor:
    """BatchNorm over all but dimension 1, written out."""
    rest = [d for d in range(x.ndim) if d != 1]
    shape = [-1 if d == 1 else 1 for d in range(x.ndim)]
    mean, var = (x.mean(rest), x.var(rest, correction=0))
    if not training:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        mean, var = norm.running_mean, norm.running_var
    scaled = (x - mean.view(shape)) / (var.view(shape) + norm.eps).sqrt()
    return scaled * norm.weight.view(shape) + norm.bias.view(shape)


@pytest.mark.parametrize("training", [True, False])
def test_one_gates_logits_by_the_trunks_pooled_map(training: bool) -> None:
    network, view = network_with(Gate).train(training), noise(5, 3, 16, 16)
    twin = copy.deepcopy(network)
    found = network(view[None])
    trunk_map, _, logits = peers_of(twin, view)
    gate = twin.ensemble
    assert isinstance(gate, Gate)
    pooled = torch.stack([trunk_map[:, c].mean((1, 2)) for c in range(32)], dim=1)
    scores = normalised(pooled @ gate.score.weight.T + gate.score.bias, gate.norm, training)
    powers = scores.clamp(min=0).exp()
    expected = sum(powers[:, j, None] / powers.sum(1, keepdim=True) * logits[j] for j in range(PEERS))
    torch.testing.assert_close(found.ensemble_logits_BC, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.logits_VBC, torch.stack(logits), rtol=1e-12, atol=1e-12)
    assert found.targets_KBC is None


@pytest.mark.parametrize("training", [True, False])
def test_okddip_attends_over_the_peers_but_the_leader(training: bool) -> None:
    network, view = network_with(Attention).train(training), noise(5, 3, 16, 16)
    _, h, z = peers_of(copy.deepcopy(network), view)
    found, head = network(view[None]), network.ensemble
    assert isinstance(head, Attention)
    assert head.query.weight.shape == (8, 64)
    torch.testing.assert_close(found.ensemble_logits_BC, (z[0] + z[1]) / 2, rtol=1e-12, atol=1e-12)
    for a in range(PEERS - 1):
        scores = [
            ((h[a] @ head.query.weight.T) * (h[b] @ head.key.weight.T)).sum(1) for b in range(PEERS - 1)
        ]
        alpha = torch.stack(scores, dim=1).softmax(1)
        expected = alpha[:, :1] * z[0] + alpha[:, 1:] * z[1]
        torch.testing.assert_close(found.targets_KBC[a], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("training", [True, False])
def test_ffl_fuses_all_last_maps(training: bool) -> None:
    network, view = network_with(Fusion).train(training), noise(5, 3, 16, 16)
    twin = copy.deepcopy(network)
    found, fusion = network(view[None]), twin.ensemble
    assert isinstance(fusion, Fusion)
    trunk_map = twin.trunk(view)
    maps = torch.cat([branch(trunk_map)[1] for branch in twin.branches], dim=1)
    assert maps.shape == (5, 3 * 64, 4, 4)
    each = [
        F.conv2d(maps[:, c : c + 1], fusion.depthwise.weight[c : c + 1], padding=1) for c in range(3 * 64)
    ]
    x = normalised(torch.cat(each, dim=1), fusion.norm1, training).clamp(min=0)
    x = torch.einsum("bchw,oc->bohw", x, fusion.pointwise.weight[:, :, 0, 0])
    x = normalised(x, fusion.norm2, training).clamp(min=0).flatten(2).mean(2)
    expected = x @ fusion.classifier.weight.T + fusion.classifier.bias
    assert expected.shape == (5, CLASSES)
    torch.testing.assert_close(found.ensemble_logits_BC, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("make", HEADS)
def test_running_statistics_and_counts_of_a_head_move_once_a_step(make: MakeHead) -> None:
    network = network_with(make)
    network.count_together()
    for _ in range(2):
        network(noise(1, 5, 3, 16, 16))
    counts = {n: int(b) for n, b in network.named_buffers() if n.endswith("num_batches_tracked")}
    assert set(counts.values()) == {2}
    of_head = [name for name in counts if name.startswith("ensemble.")]
    assert len(of_head) == {Gate: 1, Attention: 0, Fusion: 2}[make]  # pyright: ignore[reportArgumentType]


POOLINGS = [
    ("resnet8", None, "pool"),
    ("resnet32", None, "pool"),
    ("resnet110", None, "pool"),
    ("vgg16", None, "stage5.9"),
    ("wrn20_8", None, "pool"),
    ("densenet40_12", None, "pool"),
    ("resnet18", None, "avgpool"),
    ("torchvision:resnet34", "layer4", "avgpool"),
    ("torchvision:mobilenet_v3_small", "features.7", "avgpool"),
    ("resnet8", "none", "pool"),
]


@pytest.mark.parametrize(("spec", "split", "pooling"), POOLINGS)
def test_maps_are_those_before_the_pooling(spec: str, split: str | None, pooling: str) -> None:
    """Also after the layers were fused, and with the modules at which they are made replaced."""
    backbone = find_backbone(spec, split)
    network = PeerNetwork(backbone, CLASSES, 2, ensemble=Recorder).eval()
    size = 32 if backbone.family == "cifar" else 64
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        found = network(images[None])
    recorder = network.ensemble
    assert isinstance(recorder, Recorder)
    assert recorder.seen is not None
    for peer in range(2):
        plain = backbone.build(CLASSES).eval()
        plain.load_state_dict(network.deployed_state_dict(peer))
        before: list[Tensor] = []

        def keep(_layer: nn.Module, inputs: tuple[Tensor, ...], kept: list[Tensor] = before) -> None:
            kept.append(inputs[0].clone())

        plain.get_submodule(pooling).register_forward_pre_hook(keep)
        with torch.no_grad():
            expected = plain(images)
        torch.testing.assert_close(recorder.seen.maps[peer], before[0])
        torch.testing.assert_close(found.logits_VBC[peer], expected)
        assert before[0].shape[1] == recorder.shapes.map_shapes[0][0]


@pytest.mark.skipif(conv_norm.why_unavailable() is not None, reason=str(conv_norm.why_unavailable()))
@pytest.mark.parametrize("make", [*HEADS, Recorder])
@pytest.mark.parametrize("split", [None, "none"])
def test_heads_with_kernels_are_as_exact_as_with_torchs_bfloat16(make: MakeHead, split: str | None) -> None:
    """What all branches say, also when a head looks at what a chain of blocks makes; and all gradients."""
    plain = PeerNetwork(find_backbone("resnet8", split), CLASSES, PEERS, ensemble=make)
    plain = plain.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    fast, exact = copy.deepcopy(plain), copy.deepcopy(plain).double()
    fast.use_kernels(torch.device("cpu"))
    views_VBCHW = torch.randn(1, 16, 32, 32, 3).permute(0, 1, 4, 2, 3)

    def all_of(network: PeerNetwork, views: Tensor, autocast: bool) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = network(views)
        said = [out.logits_VBC, out.ensemble_logits_BC]
        said += [] if out.targets_KBC is None else [out.targets_KBC]
        torch.stack([each.double().square().mean() for each in said]).sum().backward()
        grads = [p.grad for p in network.parameters() if p.grad is not None]
        return torch.cat([t.detach().flatten().double() for t in [*said, *grads]])

    expected = all_of(exact, views_VBCHW.double(), autocast=False)
    errors = [(all_of(n, views_VBCHW, autocast=True) - expected).norm() for n in (plain, fast)]
    assert 0 < errors[1] < 1.25 * errors[0]
    assert errors[0] < 0.1 * expected.norm()


@pytest.mark.skipif(conv_norm.why_unavailable() is not None, reason=str(conv_norm.why_unavailable()))
@pytest.mark.parametrize("split", [None, "none"])
def test_a_head_that_wants_maps_leaves_the_chains_as_they_are(split: str | None) -> None:
    """The last maps come out of the chain's own operation, and there are as many chains as without a head."""
    backbone = find_backbone("resnet8", split)
    chains: list[int] = []
    for ensemble in (Recorder, False):
        network = PeerNetwork(backbone, CLASSES, PEERS, ensemble=ensemble)
        network = network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        network.use_kernels(torch.device("cpu"))
        chains.append(
            sum(bool(layer.blocks) for layer in network.modules() if isinstance(layer, ViewBatchNorm2d))
        )
        with torch.autocast("cpu", torch.bfloat16):
            network(torch.randn(1, 4, 32, 32, 3).permute(0, 1, 4, 2, 3))
        if isinstance(network.ensemble, Recorder):
            assert network.ensemble.seen is not None
            for each in network.ensemble.seen.maps:
                assert each.grad_fn is not None
                assert "_ResidualBlocks" in each.grad_fn.name()
                assert each.is_contiguous(memory_format=torch.channels_last)
                assert each.dtype == torch.bfloat16
    assert chains[0] == chains[1] > 0


class Tokens(nn.Module):
    """An image as a row of tokens, as transformers have it."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.mixing, self.last = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        return self.last(self.mixing(tokens).relu().mean(1))


def test_a_network_without_maps_serves_those_heads_that_want_none() -> None:
    backbone = Backbone("tokens", lambda _: Tokens(), "mixing", 16, "cifar")
    for make, said in ((Gate, "--method one: .* the trunk makes none"), (Fusion, "--method ffl: .* none")):
        with pytest.raises(ConfigError, match=said) as refusal:
            PeerNetwork(backbone, CLASSES, 2, ensemble=make)
        assert "\n" not in str(refusal.value)
    network = PeerNetwork(backbone, CLASSES, PEERS, ensemble=Attention)
    assert network(torch.randn(1, 4, 3, 16, 16)).targets_KBC.shape == (2, 4, CLASSES)


def test_an_ensemble_is_said_in_full_precision() -> None:
    """Gates and attention are softmaxes: nothing of them is rounded to bfloat16."""
    for make in (Gate, Attention):
        network = PeerNetwork(find_backbone("resnet8"), CLASSES, PEERS, ensemble=make)
        with torch.autocast("cpu", torch.bfloat16):
            out = network(torch.randn(1, 4, 3, 16, 16))
        assert out.logits_VBC.dtype == torch.bfloat16
        assert out.ensemble_logits_BC.dtype == torch.float32
        assert out.targets_KBC is None or out.targets_KBC.dtype == torch.float32
    assert NativeEnsemble(OneConfig()).make_head is Gate
