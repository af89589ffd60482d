"""BatchNorm over all ranks against nn.BatchNorm2d on the whole batch, in one process."""

import copy
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pcl_fast.errors import ConfigError
from pcl_fast.models.view_norm import ViewBatchNorm2d, convert_batch_norm, set_num_views, synchronise
from pcl_fast.step.obstacles import find_obstacle
from tests.models.ranks import Sum, as_threads

F64 = torch.float64
Module = Callable[[Tensor], Tensor]


def random_norm(channels: int = 5, affine: bool = True, dtype: torch.dtype = F64) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels, eps=1e-3, momentum=0.3, affine=affine)
    if affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    norm.get_buffer("running_mean").normal_()
    norm.get_buffer("running_var").uniform_()
    return norm.to(dtype)


def rank_norm(norm: nn.BatchNorm2d, views: int, add_up: Sum | None) -> ViewBatchNorm2d:
    layer = ViewBatchNorm2d.like(copy.deepcopy(norm))
    layer.num_views = views
    if add_up is not None:
        synchronise(layer, add_up)
    return layer


def gathered(parts: list[Tensor], views: int) -> Tensor:
    """The whole [V * B, ...] of what ranks have of it."""
    apart = [part.unflatten(0, (views, len(part) // views)) for part in parts]
    return torch.cat(apart, dim=1).flatten(0, 1)


def shares(whole: Tensor, views: int, sizes: tuple[int, ...]) -> list[Tensor]:
    """What ranks with so many images have of it."""
    parts = whole.unflatten(0, (views, -1)).split(sizes, dim=1)
    return [part.flatten(0, 1) for part in parts]


def steps_of(norm: nn.Module, run: Module, inputs: list[Tensor], grads: list[Tensor]) -> list[list[Tensor]]:
    """Outputs, gradients of inputs and of parameters of some steps; then what the running statistics are."""
    found: list[list[Tensor]] = []
    for x, grad in zip(inputs, grads, strict=True):
        leaf = x.detach().requires_grad_()
        out = run(leaf)
        found.append([out.detach(), *torch.autograd.grad((out * grad).sum(), [leaf, *norm.parameters()])])
    return [*found, [buffer.clone() for buffer in norm.buffers()]]


def assert_same(by_rank: list[list[list[Tensor]]], whole: list[list[Tensor]], views: int) -> None:
    """Ranks' outputs and gradients of inputs beside each other, gradients of parameters in sum."""
    near: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}
    for step, (out, of_x, *of_weights) in enumerate(whole[:-1]):
        parts = [rank[step] for rank in by_rank]
        torch.testing.assert_close(gathered([part[0] for part in parts], views), out, **near)
        torch.testing.assert_close(gathered([part[1] for part in parts], views), of_x, **near)
        for index, of_weight in enumerate(of_weights, start=2):
            torch.testing.assert_close(sum(part[index] for part in parts), of_weight, **near)
    for rank in by_rank:
        torch.testing.assert_close(rank[-1], whole[-1], **near)
        assert all(torch.equal(one, two) for one, two in zip(rank[-1], by_rank[0][-1], strict=True))


def one_by_one(norm: nn.Module, views: int) -> Module:
    return lambda x: torch.cat([norm(view) for view in x.chunk(views)])


CASES: list[tuple[tuple[int, ...], int, bool]] = [
    ((3, 5), 1, True),
    ((3, 5), 3, True),
    ((4, 4), 2, False),
    ((1, 2, 6), 8, True),
    ((0, 4), 2, True),
    ((7,), 3, True),
]


@pytest.mark.parametrize(("sizes", "views", "affine"), CASES, ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_ranks_together_are_one_batch_norm_on_the_whole_batch(sizes, views, affine, layout):
    norm, shape = random_norm(affine=affine), (views * sum(sizes), 5, 3, 2)
    inputs = [3 + torch.randn(shape, dtype=F64).to(memory_format=layout) for _ in range(3)]
    grads = [torch.randn(shape, dtype=F64) for _ in range(3)]

    def rank(number: int, add_up: Sum) -> list[list[Tensor]]:
        layer = rank_norm(norm, views, add_up)
        own = [[shares(x, views, sizes)[number] for x in xs] for xs in (inputs, grads)]
        own[0] = [x.to(memory_format=layout) for x in own[0]]
        return steps_of(layer, layer, *own)

    by_rank = as_threads(len(sizes), rank)
    assert_same(by_rank, steps_of(norm, one_by_one(norm, views), inputs, grads), views)


def test_activation_and_dropout_behind_the_norm_are_kept():
    if find_spec("timm") is None:
        pytest.skip("timm is not installed")
    from timm.layers import BatchNormAct2d

    plain = BatchNormAct2d(5, act_layer=nn.PReLU, inplace=False).double()
    inputs, grads = ([torch.randn(16, 5, 3, 2, dtype=F64)] for _ in range(2))

    def rank(number: int, add_up: Sum) -> list[list[Tensor]]:
        network = nn.Sequential(copy.deepcopy(plain))
        assert convert_batch_norm(network)
        set_num_views(network, 2)
        synchronise(network, add_up)
        own = [[shares(x, 2, (3, 5))[number] for x in xs] for xs in (inputs, grads)]
        return steps_of(network, network, *own)

    assert_same(as_threads(2, rank), steps_of(plain, one_by_one(plain, 2), inputs, grads), 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_normalised_in_float32(dtype):
    norm = random_norm(8, dtype=torch.float32)
    inputs, grads = ([torch.randn(16, 8, 4, 4).to(dtype)] for _ in range(2))

    def rank(number: int, add_up: Sum) -> list[list[Tensor]]:
        layer = rank_norm(norm, 2, add_up)
        own = [[shares(x, 2, (3, 5))[number] for x in xs] for xs in (inputs, grads)]
        return steps_of(layer, layer, *own)

    exact = copy.deepcopy(norm).double()
    in_double = [[x.double() for x in xs] for xs in (inputs, grads)]
    whole = steps_of(exact, one_by_one(exact, 2), *in_double)
    by_rank = as_threads(2, rank)
    for index in (0, 1):
        parts = [rank[0][index] for rank in by_rank]
        assert {part.dtype for part in parts} == {dtype}
        found = gathered(parts, 2).double()
        torch.testing.assert_close(found, whole[0][index], rtol=torch.finfo(dtype).eps, atol=1e-5)
    for index in (2, 3):
        found = torch.stack([rank[0][index] for rank in by_rank]).sum(0)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), whole[0][index], rtol=1e-5, atol=1e-5)


def test_a_large_mean_costs_no_precision():
    """But what float32 itself knows of such values. A variance from sums of squares would be lost."""
    norm = random_norm(4, dtype=torch.float32)
    norm.get_buffer("running_var").zero_()
    x = 1000 + torch.randn(24, 4, 9, 9) * 0.1

    def rank(number: int, add_up: Sum) -> Tensor:
        layer = rank_norm(norm, 2, add_up)
        layer(shares(x, 2, (5, 7))[number])
        return layer.get_buffer("running_var")

    exact = copy.deepcopy(norm).double()
    one_by_one(exact, 2)(x.double())
    for found in as_threads(2, rank):
        torch.testing.assert_close(found.double(), exact.get_buffer("running_var"), rtol=1e-5, atol=0)


def test_evaluation_asks_nobody():
    def never(tensor: Tensor) -> None:
        raise AssertionError

    norm = random_norm().eval()
    x = torch.randn(6, 5, 3, 3, dtype=F64)
    layer = rank_norm(norm, 2, never)
    assert torch.equal(layer(x), norm(x))
    with pytest.raises(AssertionError):
        layer.train()(x)


def test_a_view_of_one_image_of_one_pixel_is_enough_where_others_have_more():
    norm = random_norm()
    x = torch.randn(3, 5, 1, 1, dtype=F64)

    def rank(number: int, add_up: Sum) -> Tensor:
        return rank_norm(norm, 1, add_up)(x.split((1, 2))[number])

    torch.testing.assert_close(torch.cat(as_threads(2, rank)), norm(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "layer", [nn.BatchNorm1d(4), nn.SyncBatchNorm(4), nn.BatchNorm2d(4, momentum=None)], ids=repr
)
def test_a_layer_that_cannot_is_named_and_nothing_is_changed(layer):
    network = nn.Sequential(ViewBatchNorm2d(4), nn.Sequential(layer))
    with pytest.raises(ConfigError, match=rf"^--sync-bn: layer '1\.0' is a {type(layer).__name__} "):
        synchronise(network, torch.Tensor.zero_)  # type: ignore[arg-type]
    assert network[0].sum_over_ranks is None


def test_a_graph_can_hold_it():
    layer = rank_norm(random_norm(), 2, lambda tensor: None)
    x = torch.randn(6, 5, 3, 3, dtype=F64, requires_grad=True)
    assert find_obstacle(lambda: layer(x).sum().backward()) is None


# torch's own, of every input of a frame that is compiled in parts
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiling_breaks_at_the_sum_and_changes_nothing():
    norm = random_norm()
    plain, twin = (rank_norm(norm, 2, double) for _ in range(2))
    compiled = torch.compile(twin, backend="aot_eager")
    inputs, grads = ([torch.randn(8, 5, 3, 2, dtype=F64) for _ in range(2)] for _ in range(2))
    found = steps_of(twin, compiled, inputs, grads)
    expected = steps_of(plain, plain, inputs, grads)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def double(tensor: Tensor) -> None:
    """Two ranks with the same images."""
    tensor.mul_(2)
    torch._dynamo.graph_break()  # as torch.distributed's are
