"""Fused graphs compute what the plain ones do, and only what can be fused is."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from pcl_fast.kernels import conv_norm
from pcl_fast.models.fuse import attach_convolutions, chain_blocks, fuse_norms
from pcl_fast.models.peers import PeerNetwork
from pcl_fast.models.view_norm import ViewBatchNorm2d, convert_batch_norm
from pcl_fast.models.zoo import find_backbone


class Block(nn.Module):
    """A residual block in which each way of writing an addition and a ReLU occurs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.norm2 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv3, self.norm3 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = F.relu(self.norm1(self.conv1(x)))
        out = self.norm2(self.conv2(out))
        out += x
        out = self.relu(out)
        return torch.relu(torch.add(out, self.norm3(self.conv3(out))))


def traced(network: nn.Module) -> fx.GraphModule:
    part = fx.symbolic_trace(network.double())
    assert convert_batch_norm(part)
    return part


def test_every_way_of_writing_it_is_fused_and_computes_the_same() -> None:
    plain = Block()
    part = traced(copy.deepcopy(plain))
    keys = list(part.state_dict())
    assert fuse_norms(part) == 3
    assert attach_convolutions(part) == 3
    assert [node.op for node in part.graph.nodes] == ["placeholder", *["call_module"] * 3, "output"]
    assert list(part.state_dict()) == keys
    x = torch.randn(3, 16, 4, 8, dtype=torch.float64, requires_grad=True)
    plain.double()
    for mode in (True, False):
        plain.train(mode)
        part.train(mode)
        expected, found = plain(x), part(x)
        assert torch.equal(found, expected)
        for a, b in zip(
            torch.autograd.grad(found.sin().sum(), [x, *part.parameters()]),
            torch.autograd.grad(expected.sin().sum(), [x, *plain.parameters()]),
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


class Seen(nn.Module):
    """What the norm makes is used a second time, and so is its input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.other = nn.BatchNorm2d(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = self.conv(x)
        normal = self.norm(z)
        return F.relu(normal) + normal + F.relu(self.other(z) + x)


def test_what_is_seen_in_between_is_left_alone() -> None:
    part = traced(Seen())
    assert fuse_norms(part) == 0
    assert attach_convolutions(part) == 0


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(16, 16, 1, bias=False),
        nn.Conv2d(16, 16, 3, stride=(1, 2), padding=1, bias=False),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.Conv2d(16, 16, 3, bias=False),
        nn.Conv2d(16, 16, 3, padding=1, groups=2, bias=False),
        nn.Conv2d(16, 16, 3, padding=1, padding_mode="circular", bias=False),
    ],
    ids=str,
)
def test_other_convolutions_stay_where_they_are(conv: nn.Conv2d) -> None:
    part = traced(nn.Sequential(conv, nn.BatchNorm2d(16), nn.ReLU()))
    assert fuse_norms(part) == 1
    assert attach_convolutions(part) == 0


def test_a_layer_called_twice_keeps_its_convolution() -> None:
    norm = nn.BatchNorm2d(16)
    convs = [nn.Conv2d(16, 16, 3, padding=1, bias=False) for _ in range(2)]
    assert attach_convolutions(traced(nn.Sequential(convs[0], norm, convs[1], norm))) == 0


class PlainBlock(nn.Module):
    """A residual block of one shape, or of another where it is given a stride or other channels."""

    def __init__(
        self, ins: int = 16, outs: int = 16, stride: int = 1, shortcut: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(ins, outs, 3, stride, 1, bias=False), nn.BatchNorm2d(outs)
        self.conv2, self.norm2 = nn.Conv2d(outs, outs, 3, padding=1, bias=False), nn.BatchNorm2d(outs)
        self.shortcut = shortcut or nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


def halving(*layers: nn.Module, kernel: int = 1, **options: Any) -> PlainBlock:
    """A block that halves the image, whose shortcut is a convolution and then `layers`."""
    options.setdefault("bias", False)
    conv = nn.Conv2d(16, 32, kernel, 2, **options)
    return PlainBlock(16, 32, 2, nn.Sequential(conv, *layers))


def chains_of(network: nn.Module) -> tuple[fx.GraphModule, list[int]]:
    """The network fused as far as it goes, and the blocks in each chain."""
    part = traced(network)
    fuse_norms(part)
    attach_convolutions(part)
    made = chain_blocks(part)
    lengths = [
        len(layer.blocks) for layer in part.modules() if isinstance(layer, ViewBatchNorm2d) and layer.blocks
    ]
    assert made == len(lengths)
    return part, lengths


def check_it_computes_the_same(part: fx.GraphModule, plain: nn.Module) -> None:
    assert list(part.state_dict()) == list(plain.state_dict())
    plain.double()
    x = torch.randn(3, 16, 8, 16, dtype=torch.float64, requires_grad=True)
    for mode in (True, False):
        plain.train(mode)
        part.train(mode)
        assert torch.equal(part(x), plain(x))
    assert all(torch.equal(a, b) for a, b in zip(part.buffers(), plain.buffers(), strict=True))


def test_blocks_are_chained_and_compute_the_same() -> None:
    plain = nn.Sequential(
        PlainBlock(), PlainBlock(), halving(nn.BatchNorm2d(32)), PlainBlock(32, 32), PlainBlock(32, 32)
    )
    part, lengths = chains_of(copy.deepcopy(plain))
    assert lengths == [2, 3]
    assert sum(node.op == "call_module" for node in part.graph.nodes) == 2
    check_it_computes_the_same(part, plain)


@pytest.mark.parametrize(
    "block",
    [
        halving(),
        halving(nn.BatchNorm2d(32), nn.BatchNorm2d(32)),
        halving(nn.BatchNorm2d(32), bias=True),
        halving(nn.BatchNorm2d(32), groups=2),
        halving(nn.BatchNorm2d(32), kernel=3, padding=1),
    ],
    ids=["no norm", "two norms", "bias", "groups", "kernel 3"],
)
def test_other_blocks_that_halve_the_image_are_in_no_chain(block: PlainBlock) -> None:
    plain = nn.Sequential(PlainBlock(), block, PlainBlock(32, 32), PlainBlock(32, 32))
    part, lengths = chains_of(copy.deepcopy(plain))
    assert lengths == [1, 2]
    check_it_computes_the_same(part, plain)


class Peeping(nn.Module):
    """Two blocks, and a look at what passes between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = PlainBlock(), PlainBlock()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        between = self.first(x)
        return self.second(between) + between.mean()


def test_a_chain_ends_where_something_else_looks_on() -> None:
    assert chains_of(Peeping())[1] == [1, 1]
    assert chains_of(Block())[1] == [1], "the third convolution belongs to no block of two"


class Reused(nn.Module):
    """Two blocks with one shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.first = halving(nn.BatchNorm2d(32))
        self.second = PlainBlock(16, 32, 2, self.first.shortcut)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x) + self.second(x)


def test_a_shortcut_used_twice_stays_where_it_is() -> None:
    plain = Reused()
    part, lengths = chains_of(copy.deepcopy(plain))
    assert lengths == []
    assert torch.equal(part(x := torch.randn(2, 16, 4, 8, dtype=torch.float64)), plain.double()(x))


@pytest.mark.skipif(conv_norm.why_unavailable() is not None, reason=str(conv_norm.why_unavailable()))
@pytest.mark.parametrize("trunk_views", ["batched", "loop"])
def test_a_network_with_kernels_learns_what_it_learns_without(trunk_views) -> None:
    plain = PeerNetwork(find_backbone("resnet8"), 10, trunk_views=trunk_views)
    plain = plain.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    fast, exact = copy.deepcopy(plain), copy.deepcopy(plain).double()
    fast.use_kernels(torch.device("cpu"))
    assert fast.state_dict().keys() == plain.state_dict().keys()
    views_VBCHW = torch.randn(3, 16, 32, 32, 3).permute(0, 1, 4, 2, 3)

    def gradients(network: PeerNetwork, views: torch.Tensor, autocast: bool) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = network(views)
        (out.logits_VBC.double().square().mean() + out.ensemble_logits_BC.double().square().mean()).backward()
        flat = [p.grad.flatten().double() for p in network.parameters() if p.grad is not None]
        return torch.cat([*flat, *(b.flatten().double() for b in network.buffers())])

    expected = gradients(exact, views_VBCHW.double(), autocast=False)
    errors = [(gradients(n, views_VBCHW, autocast=True) - expected).norm() for n in (plain, fast)]
    assert 0 < errors[1] < 1.2 * errors[0], "no further from float64 than torch's own bfloat16"


@pytest.mark.skipif(conv_norm.why_unavailable() is not None, reason=str(conv_norm.why_unavailable()))
def test_a_copy_has_its_own_convolutions() -> None:
    network = PeerNetwork(find_backbone("resnet8"), 10)
    network.use_kernels(torch.device("cpu"))
    twin = copy.deepcopy(network)
    for trunk in (network.trunk, twin.trunk):
        last = trunk.get_submodule("stage1.0.body.4")
        assert isinstance(last, ViewBatchNorm2d)
        assert last.blocks == ((trunk.get_submodule("stage1.0.body.1"), last),)
        shortcut = trunk.get_submodule("stage2.0.shortcut.1")
        assert isinstance(shortcut, ViewBatchNorm2d)
        assert shortcut.conv == (trunk.get_submodule("stage2.0.shortcut.0"),)
        halves = trunk.get_submodule("stage2.0.body.4")
        assert isinstance(halves, ViewBatchNorm2d)
        assert halves.blocks == ((trunk.get_submodule("stage2.0.body.1"), halves, shortcut),)
    mine, its = (n.trunk.get_submodule("stem.1").conv[0] for n in (network, twin))  # pyright: ignore
    assert its is twin.trunk.get_submodule("stem.0")
    assert mine is network.trunk.get_submodule("stem.0")
