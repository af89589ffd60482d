"""What a network computes and moves, against counts by hand."""

import operator
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torchvision.ops.misc import Conv2dNormActivation

from pcl_fast.models.network_operations import network_operations
from pcl_fast.models.operations import Operation, operations_of
from pcl_fast.models.zoo import Backbone


class Block(nn.Module):
    """relu(norm2(conv2(relu(norm1(conv1(x))))) + shortcut(x)), of 4 channels and half the size."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(2, 4, 3, 2, 1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.norm2 = nn.Conv2d(4, 4, 3, 1, 1), nn.BatchNorm2d(4)
        self.shortcut = nn.Conv2d(2, 4, 1, 2, bias=False)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x)))))
        y += self.shortcut(x)
        return self.relu(y)


def found_in(network: nn.Module, x: Tensor, needs_gradient: bool = True) -> list[Operation]:
    return list(operations_of(fx.symbolic_trace(network), x, needs_gradient)[0])


def test_a_residual_block_by_hand() -> None:
    """Images of 8 x 8, so 2 * 64 elements in, 4 * 16 out."""
    inside, out = 128, 64
    weights = (4 * 2 * 9, 4 * 4 * 9 + 4, 4 * 2)
    products = [
        Operation(kind="product", flops=2 * 16 * w, read=read, written=out, parameters=w + bias)
        for w, bias, read in ((72, 0, inside), (144, 4, out), (8, 0, inside))
    ]
    assert [product.parameters for product in products] == list(weights)
    norm = Operation(kind="norm", read=out, written=out, parameters=8)
    relu = Operation(kind="activation", read=out, written=out, rides=True)
    added = Operation(kind="addition", read=2 * out, written=out, rides=True)
    fork = Operation(kind="fork", read=inside, written=inside)
    expected = [fork, products[0], norm, relu, products[1], norm, products[2], added, relu]
    assert found_in(Block(), torch.zeros(1, 2, 8, 8)) == expected
    assert products[0].backward_flops == 2 * products[0].flops


def test_an_image_wants_no_gradient() -> None:
    """Neither do what is made of it without parameters, nor the sum of its two uses."""
    network = nn.Sequential(nn.AvgPool2d(2), Block())
    found = found_in(network, torch.zeros(1, 2, 8, 8), needs_gradient=False)
    assert [operation.kind for operation in found if not operation.needs_gradient] == [
        "pass",
        *["product"] * 2,
    ]
    assert "fork" not in [operation.kind for operation in found]
    assert found[1].backward_flops == found[1].flops


class Views(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=1)
        y = first.flatten(1).reshape(1, 2, -1)[:, :1]
        return torch.cat([y.transpose(0, 1), second.reshape(1, 1, -1)[..., :8]], dim=2)


def test_views_cost_nothing() -> None:
    found = found_in(nn.Sequential(nn.Identity(), nn.Dropout(), Views()), torch.zeros(1, 2, 4, 4))
    kinds = [operation.kind for operation in found]
    assert kinds.count("concatenation") == 1
    assert set(kinds) <= {"concatenation", "fork"}


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(4), nn.Conv2d(4, 3, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(self.norm(x))], dim=1)


def test_a_dense_layer_adds_the_gradients_of_what_it_passes_on() -> None:
    found = found_in(Dense(), torch.zeros(1, 4, 5, 5))
    assert found == [
        Operation(kind="fork", read=100, written=100, rides=True),
        Operation(kind="norm", read=100, written=100, parameters=8),
        Operation(kind="product", flops=2 * 12 * 25, read=100, written=75, parameters=12),
        Operation(kind="concatenation", read=175, written=175),
    ]


@pytest.mark.parametrize("function", [operator.add, torch.add, lambda x, y: x.add(y), lambda x, y: x.add_(y)])
def test_an_addition_rides_only_beside_a_norm(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    class Sum(nn.Module):
        def __init__(self, *last: nn.Module) -> None:
            super().__init__()
            self.a, self.b, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Sequential(*last)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(function(self.a(x), self.b(x)))

    for last, rides in ((nn.LayerNorm(6), True), (nn.Linear(6, 6), False)):
        found = found_in(Sum(last), torch.zeros(1, 6))
        assert [each.rides for each in found if each.kind == "addition"] == [rides]


def test_layers_of_torchvision_are_looked_into() -> None:
    layer = nn.Sequential(Conv2dNormActivation(3, 8, activation_layer=nn.Hardswish), nn.ReLU6())
    backbone = Backbone("t", lambda classes: Small(layer, classes), "second", 16, "cifar")
    found = network_operations(backbone, 5, 16)
    assert [each.kind for each in found.trunk] == ["product", "norm", "activation", "activation"]
    assert [each.rides for each in found.trunk] == [False, False, True, True]


class Small(nn.Module):
    """`first`, a convolution of 8 channels, the mean, and a classifier."""

    def __init__(self, first: nn.Module, classes: int) -> None:
        super().__init__()
        self.first, self.second = first, nn.Conv2d(8, 8, 1)
        self.classifier = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.second(self.first(x)).mean((2, 3)))


def test_parts_and_parameters_of_peers() -> None:
    backbone = Backbone("t", lambda classes: Small(nn.Conv2d(3, 8, 1), classes), "second", 16, "cifar")
    torch.manual_seed(3)
    before = torch.get_rng_state()
    found = network_operations(backbone, 5, 16)
    assert torch.equal(torch.get_rng_state(), before)
    assert (found.trunk_parameters, found.branch_parameters, found.feature_dim) == (32, 72 + 45, 8)
    assert [each.kind for each in found.branch] == ["product", "pass", "product"]
    assert found.parameters == 149
    assert found.peer_parameters(4, ensemble=True) == 32 + 4 * 117 + (4 * 8 * 5 + 5)
    assert found.peer_parameters(1, ensemble=False) == 149
    stem, branch = 2 * 256 * 24, 2 * 256 * 64 + 2 * 40
    assert found.forward_flops == stem + branch
    assert found.step_flops(1, 1, ensemble=False, teacher=False) == 2 * stem + 3 * branch
    assert found.step_flops(2, 2, ensemble=True, teacher=True) == 2 * (3 * stem + 4 * branch) + 3 * 2 * 80


def test_attention_is_counted_as_in_training() -> None:
    """In eval mode torch takes another way through it, which no counter sees: 4 projections, 2 products."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attend = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attend(x, x, x, need_weights=False)[0]

    found = found_in(Attention(), torch.zeros(1, 5, 8))
    assert sum(each.flops for each in found) == 2 * (4 * 5 * 8 * 8 + 2 * 5 * 5 * 8)
    assert [each.parameters for each in found] == [4 * 8 * 8 + 4 * 8]
