"""BatchNorm, residual and ReLU in one, on a CUDA device: against torch, twice, in a graph, and very large."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcl_fast.kernels import norm_act
from pcl_fast.kernels.norm_act import NormState
from pcl_fast.models.view_norm import ViewBatchNorm2d
from tests.kernels.reference import LAST, copy_of, distance, in_float64, outcome

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(120)]
pytest.importorskip("triton", reason="triton is not installed")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16

# (images of all views, channels, height, width), views: of ResNet-32, DenseNet-40, ResNet-50, and odd ones.
SIZES = [
    ((384, 16, 32, 32), 3),
    ((384, 32, 16, 16), 3),
    ((128, 64, 8, 8), 1),
    ((192, 168, 32, 32), 3),
    ((192, 256, 56, 56), 3),
    ((192, 2048, 7, 7), 3),
    ((40, 3, 63, 61), 8),
    ((6, 130, 5, 3), 2),
    ((5, 1000, 1, 1), 1),
]


def random(shape: tuple[int, ...], dtype: torch.dtype, shift: float = 0.0) -> Tensor:
    values = torch.randn(shape, device="cuda").add_(shift).to(dtype)
    return values.contiguous(memory_format=LAST).requires_grad_()


def layer(channels: int) -> NormState:
    draw: Any = {"device": "cuda", "dtype": F32}
    weight, bias = torch.rand(channels, **draw).add_(0.5), torch.randn(channels, **draw)
    running = torch.randn(channels, **draw), torch.rand(channels, **draw).add_(0.5)
    return NormState(weight.requires_grad_(), bias.requires_grad_(), *running, momentum=0.3, eps=1e-3)


def ours(
    x: Tensor, state: NormState, residual: Tensor | None, relu: bool, views: int, grad: Tensor
) -> list[Tensor]:
    """The output, all gradients and the new running statistics."""
    state = copy_of(state)
    inputs = (x, state.weight, state.bias, residual)
    found = outcome(lambda: norm_act.norm_act(x, state, residual, relu, views), inputs, grad)
    return [*found, state.running_mean, state.running_var]


@pytest.mark.parametrize(("with_residual", "relu"), [(True, True), (False, True), (True, False)])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize(("shape", "views"), SIZES, ids=str)
def test_it_is_torchs_in_float64_and_twice_the_same(shape, views, dtype, with_residual, relu) -> None:
    x, state = random(shape, dtype, shift=3.0), layer(shape[1])
    residual = random(shape, dtype) if with_residual else None
    grad = torch.randn(shape, device="cuda").to(dtype)
    assert norm_act.takes(x, state.weight, residual)
    found = ours(x, state, residual, relu, views, grad)
    again = ours(x, state, residual, relu, views, grad)
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))
    del again
    x64, residual64, exact = in_float64(x), in_float64(residual), copy_of(state, double=True)
    assert x64 is not None
    expected = outcome(
        lambda: norm_act.reference(x64, exact, residual64, relu, views),
        (x64, exact.weight, exact.bias, residual64),
        grad,
    )
    expected += [exact.running_mean, exact.running_var]
    half_ulp = {F32: 2**-20, BF16: 2**-8, F16: 2**-11}[dtype]
    torch.testing.assert_close(found[0].double(), expected[0], rtol=half_ulp, atol=5e-5)
    # A value rounded to zero also loses its gradient.
    bound = 1e-5 if dtype == F32 else 4 * half_ulp
    assert [d for d in map(distance, found, expected) if d > bound] == []
    assert max(map(distance, found[-2:], expected[-2:])) < 5e-6


def test_a_large_mean_costs_no_precision() -> None:
    x, state = random((384, 16, 32, 32), F32), layer(16)
    x = (1000 + x.detach()).requires_grad_()
    grad = torch.randn(x.shape, device="cuda")
    found, exact, x64 = ours(x, state, None, False, 3, grad), copy_of(state, double=True), in_float64(x)
    assert x64 is not None
    expected = outcome(
        lambda: norm_act.reference(x64, exact, None, False, 3), (x64, exact.weight, exact.bias), grad
    )
    assert max(map(distance, found[:4], expected)) < 1e-4
    assert distance(found[-1], exact.running_var) < 5e-6


def test_a_replayed_graph_is_the_same_as_its_kernels() -> None:
    shape, views = (384, 32, 16, 16), 3
    x, residual, state = random(shape, BF16), random(shape, BF16), layer(32)
    grad = torch.randn(shape, device="cuda").bfloat16().contiguous(memory_format=LAST)
    given: Any = (x, state, residual, True, views, grad)
    captured_state = copy_of(state)
    inputs = (x, state.weight, state.bias, residual)

    def run() -> list[Tensor]:
        return outcome(lambda: norm_act.norm_act(x, captured_state, residual, True, views), inputs, grad)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            found = run()
    for mean_or_var in ("running_mean", "running_var"):
        getattr(captured_state, mean_or_var).copy_(getattr(state, mean_or_var))
    for tensor in found:
        tensor.detach().fill_(float("nan"))
    graph.replay()
    found += [captured_state.running_mean, captured_state.running_var]
    assert all(torch.equal(one, other) for one, other in zip(found, ours(*given), strict=True))


def test_more_than_31_bits_of_elements() -> None:
    shape = (2, 64, 4104, 4104)  # of two views, each of fewer, so that torch can do them
    if torch.cuda.mem_get_info()[0] < 60 * 2**30:
        pytest.skip("needs 60 GiB of free device memory")
    x = torch.empty(shape, device="cuda", dtype=BF16, memory_format=LAST).normal_().requires_grad_()
    grad = torch.empty_like(x).normal_()
    assert x.numel() > 2**31
    state = layer(64)
    found = ours(x, state, None, False, 2, grad)
    last, plain = x[1:].detach().requires_grad_(), copy_of(state)
    buffers = (plain.running_mean, plain.running_var)
    parameters = (plain.weight, plain.bias, True, plain.momentum, plain.eps)
    with torch.no_grad():
        F.batch_norm(x[:1], *buffers, *parameters)
    y = F.batch_norm(last, *buffers, *parameters)
    (grad_last,) = torch.autograd.grad(y, last, grad[1:])
    torch.testing.assert_close(found[0][1:], y, rtol=2**-7, atol=1e-3)
    torch.testing.assert_close(found[1][1:], grad_last, rtol=2**-6, atol=1e-3)
    torch.testing.assert_close(found[-2:], [*buffers], rtol=1e-4, atol=1e-5)


def test_the_layer_uses_it_and_is_the_same_without() -> None:
    norm = ViewBatchNorm2d.like(nn.BatchNorm2d(24)).cuda()
    norm.num_views = 3
    x, residual = random((48, 24, 16, 16), BF16), random((48, 24, 16, 16), BF16)
    with_kernel, without = copy.deepcopy(norm), norm
    with_kernel.use_kernels = True
    y, plain = with_kernel(x, residual, True), without(x, residual, True)
    assert "_NormAct" in str(y.grad_fn)
    assert "_NormAct" not in str(plain.grad_fn)
    torch.testing.assert_close(y, plain, rtol=2**-6, atol=2**-5)  # which is rounded three times
    for mine, other in zip(with_kernel.buffers(), without.buffers(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


def test_what_it_does_not_take() -> None:
    x, weight = random((2, 24, 4, 4), BF16), torch.ones(24, device="cuda")
    assert norm_act.takes(x, weight, x)
    assert not norm_act.takes(x, weight.cpu(), None)
    assert not norm_act.takes(x, weight, x.float())
    assert not norm_act.takes(x, weight, x[:1])
    assert not norm_act.takes(x.contiguous(), weight, None)
    assert not norm_act.takes(x.double(), weight, None)
    if torch.cuda.device_count() > 1:  # Triton launches on the current device
        with torch.cuda.device(1):
            assert not norm_act.takes(x, weight, None)
