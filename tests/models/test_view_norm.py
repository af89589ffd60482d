"""Per-view BatchNorm against V calls of nn.BatchNorm2d, one view after the other."""

import copy
from importlib.util import find_spec

import pytest
import torch
from torch import nn

from pcl_fast.errors import ConfigError
from pcl_fast.models.view_norm import ViewBatchNorm2d, convert_batch_norm, set_num_views
from pcl_fast.models.view_statistics import normalise_by_formula

LAYOUTS = [torch.contiguous_format, torch.channels_last]


def random_norm(channels: int = 5, affine: bool = True, dtype=torch.float64) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels, eps=1e-3, momentum=0.3, affine=affine)
    if affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    norm.get_buffer("running_mean").normal_()
    norm.get_buffer("running_var").uniform_()
    return norm.to(dtype)


def per_view(norm: nn.BatchNorm2d, views: int) -> ViewBatchNorm2d:
    layer = ViewBatchNorm2d.like(copy.deepcopy(norm))
    layer.num_views = views
    return layer


def formula(norm: ViewBatchNorm2d, x):
    norm.get_buffer("num_batches_tracked").add_(norm.num_views)
    return normalise_by_formula(x, norm, norm.num_views)


def outcome(norm: nn.BatchNorm2d, run, steps):
    """Outputs and gradients of some steps, then what the running statistics are."""
    seen = []
    for x, grad in steps:
        leaf = x.detach().requires_grad_()
        out = run(leaf)
        seen += [out, *torch.autograd.grad(out, [leaf, *norm.parameters()], grad)]
    return [*seen, *norm.buffers()]


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("views", [2, 3, 8])
def test_both_ways_are_v_calls_of_batch_norm(views, layout, affine):
    norm = random_norm(affine=affine)
    kernel, plain = per_view(norm, views), per_view(norm, views)
    shape = (views * 4, 5, 3, 2)
    steps = [
        (torch.randn(shape, dtype=torch.float64).to(memory_format=layout), torch.randn(shape).double())
        for _ in range(3)
    ]
    expected = outcome(norm, lambda x: torch.cat([norm(view) for view in x.chunk(views)]), steps)
    for found, reference in zip(outcome(kernel, kernel, steps), expected, strict=True):
        assert torch.equal(found, reference)
    for found, reference in zip(outcome(plain, lambda x: formula(plain, x), steps), expected, strict=True):
        torch.testing.assert_close(found, reference, rtol=1e-11, atol=1e-11)
    assert int(norm.get_buffer("num_batches_tracked")) == 3 * views


def test_running_statistics_follow_the_closed_form_of_three_views():
    norm = per_view(random_norm(), 3)
    x = torch.randn(12, 5, 2, 2, dtype=torch.float64)
    r, a = norm.get_buffer("running_var").clone(), 0.3
    s1, s2, s3 = (view.transpose(0, 1).flatten(1).var(1, correction=1) for view in x.chunk(3))
    norm(x)
    expected = (1 - a) ** 3 * r + a * ((1 - a) ** 2 * s1 + (1 - a) * s2 + s3)
    torch.testing.assert_close(norm.running_var, expected, rtol=1e-13, atol=0)


def test_gradients_are_those_of_finite_differences():
    norm = per_view(random_norm(2), 2)
    x = torch.randn(4, 2, 2, 1, dtype=torch.float64, requires_grad=True)
    inputs = (x, norm.weight, norm.bias)
    assert torch.autograd.gradcheck(lambda x, _w, _b: norm(x), inputs)
    assert torch.autograd.gradcheck(lambda x, _w, _b: normalise_by_formula(x, norm, norm.num_views), inputs)
    assert torch.autograd.gradgradcheck(
        lambda x, _w, _b: normalise_by_formula(x, norm, norm.num_views), inputs
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bfloat16_input_with_float32_parameters(layout):
    norm = random_norm(8, dtype=torch.float32)
    kernel, plain = per_view(norm, 2), per_view(norm, 2)
    x = torch.randn(8, 8, 4, 4).bfloat16().to(memory_format=layout)
    grad = torch.randn(8, 8, 4, 4).bfloat16().to(memory_format=layout)
    expected = outcome(norm, lambda x: torch.cat([norm(view) for view in x.chunk(2)]), [(x, grad)])
    for found, reference in zip(outcome(kernel, kernel, [(x, grad)]), expected, strict=True):
        assert torch.equal(found, reference)
    found = outcome(plain, lambda x: formula(plain, x), [(x, grad)])
    assert found[0].is_contiguous(memory_format=layout)
    for one, reference in zip(found, expected, strict=True):
        assert one.dtype == reference.dtype
        torch.testing.assert_close(one, reference, rtol=2e-2, atol=4e-2)


def test_one_view_and_evaluation_are_batch_norm_to_the_bit():
    norm = random_norm(dtype=torch.float32)
    layer = per_view(norm, 1)
    x = torch.randn(6, 5, 3, 3)
    assert torch.equal(layer(x), norm(x))
    layer.num_views = 3
    assert torch.equal(layer.eval()(x), norm.eval()(x))
    assert all(torch.equal(a, b) for a, b in zip(layer.buffers(), norm.buffers(), strict=True))


def test_compiling_takes_the_formula_and_keeps_the_statistics():
    norm = per_view(random_norm(), 3)
    twin = copy.deepcopy(norm)
    x = torch.randn(6, 5, 2, 2, dtype=torch.float64)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), norm(x), rtol=1e-12, atol=1e-12)
    for found, expected in zip(twin.buffers(), norm.buffers(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_a_single_value_has_no_statistics():
    norm = per_view(random_norm(dtype=torch.float32), 2)
    with pytest.raises(ConfigError, match="batch of 2 or more"):
        norm(torch.randn(2, 5, 1, 1))


def test_conversion_keeps_keys_values_and_sharing():
    shared = nn.BatchNorm2d(4)
    inner = nn.Sequential(shared, nn.BatchNorm2d(4).eval())
    network = nn.Sequential(nn.Conv2d(3, 4, 1), shared, inner)
    before = {key: value.data_ptr() for key, value in network.state_dict().items()}
    assert convert_batch_norm(network)
    set_num_views(network, 3)
    assert {key: value.data_ptr() for key, value in network.state_dict().items()} == before
    assert network[1] is inner[0]
    assert isinstance(network[1], ViewBatchNorm2d)
    assert network[1].num_views == 3
    assert (network[1].training, inner[1].training) == (True, False)


@pytest.mark.parametrize(
    "layer",
    [
        nn.BatchNorm1d(4),
        nn.BatchNorm3d(4),
        nn.SyncBatchNorm(4),
        nn.BatchNorm2d(4, momentum=None),
        nn.BatchNorm2d(4, track_running_stats=False),
        nn.InstanceNorm2d(4, track_running_stats=True),
        type("OwnBatchNorm2d", (nn.BatchNorm2d,), {})(4),
    ],
    ids=repr,
)
def test_layers_that_mix_views_otherwise_are_left_to_the_loop(layer):
    network = nn.Sequential(nn.BatchNorm2d(4), layer)
    assert not convert_batch_norm(network)
    assert type(network[0]) is nn.BatchNorm2d


def test_layers_without_batch_statistics_do_not_stand_in_the_way():
    assert convert_batch_norm(nn.Sequential(nn.InstanceNorm2d(4), nn.GroupNorm(2, 4), nn.LayerNorm(4)))


def test_batch_norm_with_activation_keeps_both():
    if find_spec("timm") is None:
        pytest.skip("timm is not installed")
    from timm.layers import BatchNormAct2d

    plain = BatchNormAct2d(4, act_layer=nn.PReLU, inplace=False).double()
    network = nn.Sequential(copy.deepcopy(plain))
    keys = list(network.state_dict())
    assert convert_batch_norm(network)
    set_num_views(network, 2)
    assert list(network.state_dict()) == keys
    x = torch.randn(6, 4, 2, 2, dtype=torch.float64)
    assert torch.equal(network(x), torch.cat([plain(view) for view in x.chunk(2)]))
    assert torch.equal(network.get_buffer("0.running_var"), plain.get_buffer("running_var"))
