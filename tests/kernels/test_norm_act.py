"""BatchNorm, residual and ReLU in one kernel, against the same in plain torch."""

import pytest
import torch

from pcl_fast import native
from pcl_fast.kernels import norm_act
from tests.kernels.reference import LAST, copy_of, distance, image, in_float64, norm_state, outcome

# The kernels are part of the product wherever there is a compiler, and the tests' machine has one.
pytestmark = pytest.mark.skipif(
    native.why_unavailable(norm_act.SOURCE) is not None,
    reason=str(native.why_unavailable(norm_act.SOURCE)),
)

SHAPES = [(6, 16, 5, 7), (4, 32, 16, 16), (2, 48, 9, 3), (6, 112, 4, 4), (4, 64, 1, 1)]


@pytest.mark.parametrize("relu", [True, False], ids=["relu", "linear"])
@pytest.mark.parametrize("with_residual", [True, False], ids=["residual", "alone"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_batch_norm_addition_and_relu(shape, dtype, with_residual, relu):
    torch.manual_seed(1)
    x, state = image(*shape, dtype=dtype, shift=3.0), norm_state(shape[1])
    residual = image(*shape, dtype=dtype) if with_residual else None
    grad = torch.randn(shape).bfloat16()
    assert norm_act.takes(x, state.weight, residual)
    ours, exact = copy_of(state), copy_of(state, double=True)
    x64, residual64 = in_float64(x), in_float64(residual)
    assert x64 is not None
    found = outcome(
        lambda: norm_act.norm_act(x, ours, residual, relu, views=2),
        (x, state.weight, state.bias, residual),
        grad,
    )
    expected = outcome(
        lambda: norm_act.reference(x64, exact, residual64, relu, views=2),
        (x64, exact.weight, exact.bias, residual64),
        grad,
    )
    # bfloat16 has 8 bits; a value rounded to zero also loses its gradient, which few elements do.
    bound = 1e-5 if dtype == torch.float32 else 1e-2
    assert [
        round(distance(f, e), 6) for f, e in zip(found, expected, strict=True) if distance(f, e) > bound
    ] == []
    assert found[0].is_contiguous(memory_format=LAST)
    assert distance(ours.running_mean, exact.running_mean) < 1e-5
    assert distance(ours.running_var, exact.running_var) < 1e-5


def test_a_large_mean_costs_no_precision():
    x = (1000 + torch.randn(64, 16, 8, 8)).contiguous(memory_format=LAST)
    state = norm_state(16)
    exact = copy_of(state, double=True)
    found = norm_act.norm_act(x, state, None, relu=False)
    assert distance(found.detach(), norm_act.reference(x.double(), exact, None, relu=False).detach()) < 1e-4


def test_what_is_not_a_number_stays_so():
    x = image(4, 16, 4, 4).detach()
    x[1, 5, 2, 2] = float("nan")
    out = norm_act.norm_act(x, norm_state(16), None, relu=False)
    assert out[:, 5].isnan().all()
    assert not out[:, [c for c in range(16) if c != 5]].isnan().any()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_result_does_not_depend_on_the_number_of_threads(threads):
    torch.manual_seed(2)
    x, state, grad = image(32, 16, 16, 16), norm_state(16), torch.randn(32, 16, 16, 16).bfloat16()
    inputs = (x, state.weight, state.bias)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        expected = outcome(lambda: norm_act.norm_act(x, copy_of(state), None, True), inputs, grad)
        torch.set_num_threads(threads)
        found = outcome(lambda: norm_act.norm_act(x, copy_of(state), None, True), inputs, grad)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_what_it_does_not_take():
    x, weight = image(2, 16, 4, 4), torch.ones(16)
    assert norm_act.takes(x, weight, x)
    assert not norm_act.takes(x, None, None)
    assert not norm_act.takes(x.double(), weight, None)
    assert not norm_act.takes(x.contiguous(), weight, None)
    assert not norm_act.takes(image(2, 24, 4, 4), torch.ones(24), None)
    assert not norm_act.takes(x, weight.double(), None)
    assert not norm_act.takes(x, weight, x.float())
