"""Convolution, BatchNorm, residual and ReLU in one kernel, against the same in plain torch."""

import pytest
import torch
import torch.nn.functional as F

from pcl_fast.kernels import conv_norm, norm_act
from pcl_fast.kernels.conv_norm import ConvState
from tests.kernels.reference import LAST, copy_of, distance, image, in_float64, norm_state, outcome

pytestmark = pytest.mark.skipif(
    conv_norm.why_unavailable() is not None, reason=str(conv_norm.why_unavailable())
)

# images, channels in and out, height and width of the result, stride
CASES = [
    (4, 16, 16, 32, 32, 1),
    (6, 32, 32, 16, 16, 1),
    (4, 64, 64, 8, 8, 1),
    (2, 3, 16, 8, 16, 1),
    (2, 32, 64, 2, 8, 1),
    (6, 16, 32, 16, 16, 2),
    (4, 32, 64, 8, 8, 2),
    (2, 64, 64, 2, 8, 2),
    (2, 3, 16, 4, 8, 2),
]


def inputs_of(case, with_residual=True):
    images, ins, outs, height, width, stride = case
    x = image(images, ins, height * stride, width * stride)
    if ins == 3:
        x = x.detach().float()
    conv = ConvState(image(outs, ins, 3, 3, dtype=torch.float32), stride)
    residual = image(images, outs, height, width) if with_residual else None
    return x, conv, norm_state(outs), residual


@pytest.mark.parametrize("relu", [True, False], ids=["relu", "linear"])
@pytest.mark.parametrize("with_residual", [True, False], ids=["residual", "alone"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_is_convolution_batch_norm_addition_and_relu(case, with_residual, relu):
    torch.manual_seed(1)
    x, conv, state, residual = inputs_of(case, with_residual)
    assert conv_norm.takes(x, conv, state.weight, residual)
    ours, exact = copy_of(state), copy_of(state, double=True)
    x64, weight64, residual64 = in_float64(x), in_float64(conv.weight), in_float64(residual)
    assert x64 is not None
    assert weight64 is not None
    grad = torch.randn(case[0], case[2], case[3], case[4]).bfloat16()
    found = outcome(
        lambda: conv_norm.conv_norm_act(x, conv, ours, residual, relu, views=2),
        (x, conv.weight, state.weight, state.bias, residual),
        grad,
    )
    # What bfloat16 rounds to zero has no gradient: the reference is given the same zeros.
    passed = found[0].detach().double() > 0 if relu else torch.ones(())

    def reference():
        z = F.conv2d(x64, weight64, stride=conv.stride, padding=1)
        return norm_act.reference(z, exact, residual64, relu=False, views=2) * passed

    expected = outcome(reference, (x64, weight64, exact.weight, exact.bias, residual64), grad)
    assert [distance(f, e) for f, e in zip(found, expected, strict=True) if distance(f, e) > 1e-2] == []
    assert found[0].is_contiguous(memory_format=LAST)
    assert distance(ours.running_mean, exact.running_mean) < 2e-3
    assert distance(ours.running_var, exact.running_var) < 2e-3


def test_without_gradients_the_result_is_the_same():
    x, conv, state, residual = inputs_of(CASES[0])
    expected = conv_norm.conv_norm_act(x, conv, copy_of(state), residual, relu=True, views=2)
    with torch.no_grad():
        found = conv_norm.conv_norm_act(x, conv, copy_of(state), residual, relu=True, views=2)
    assert torch.equal(found, expected)


def test_the_gradient_of_the_weight_sums_the_views():
    x, conv, state, _ = inputs_of(CASES[0])
    grad = torch.randn(4, 16, 32, 32).bfloat16()
    both = outcome(
        lambda: conv_norm.conv_norm_act(x, conv, state, None, True, views=2), (conv.weight,), grad
    )[1]
    each = [
        outcome(lambda v=v: conv_norm.conv_norm_act(x[v], conv, state, None, True), (conv.weight,), grad[v])[
            1
        ]
        for v in (slice(0, 2), slice(2, 4))
    ]
    torch.testing.assert_close(both, each[0] + each[1])


def test_the_result_does_not_depend_on_the_number_of_threads():
    x, conv, state, _ = inputs_of((7, 64, 64, 8, 8, 1))
    grad = torch.randn(7, 64, 8, 8).bfloat16()
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(
                outcome(
                    lambda: conv_norm.conv_norm_act(x, conv, copy_of(state), None, True),
                    (x, conv.weight),
                    grad,
                )
            )
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_what_it_does_not_take():
    x, conv, state, residual = inputs_of(CASES[0])
    gamma = state.weight
    assert conv_norm.takes(x, conv, gamma, residual)
    assert not conv_norm.takes(x.float(), conv, gamma, None)
    assert not conv_norm.takes(x.contiguous(), conv, gamma, None)
    assert not conv_norm.takes(x, ConvState(conv.weight.contiguous()), gamma, None)
    assert not conv_norm.takes(x, ConvState(conv.weight.bfloat16()), gamma, None)
    assert not conv_norm.takes(x, ConvState(image(16, 16, 1, 1, dtype=torch.float32)), gamma, None)
    assert not conv_norm.takes(x, conv, None, None)
    assert not conv_norm.takes(x, conv, gamma, x.float())
    assert not conv_norm.takes(x[:, :, :7], conv, gamma, None)
    assert not conv_norm.takes(image(2, 16, 8, 12), conv, gamma, None)
    assert not conv_norm.takes(image(2, 16, 8, 8), ConvState(conv.weight, 2), gamma, None)
    picture = image(2, 3, 8, 8, dtype=torch.float32)
    thin = ConvState(image(16, 3, 3, 3, dtype=torch.float32))
    assert not conv_norm.takes(picture, thin, gamma, None), "a picture that wants a gradient"
    assert conv_norm.takes(picture.detach(), thin, gamma, None)
