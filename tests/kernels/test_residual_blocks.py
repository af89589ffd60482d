"""A chain of residual blocks in one kernel, against the same block by block, and in float64."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pcl_fast.kernels import norm_act, residual_blocks
from pcl_fast.kernels.conv_norm import ConvState
from pcl_fast.kernels.residual_blocks import ResidualBlock, takes_blocks
from tests.kernels.reference import LAST, copy_of, distance, image, in_float64, norm_state, outcome

pytestmark = pytest.mark.skipif(
    residual_blocks.why_unavailable() is not None, reason=str(residual_blocks.why_unavailable())
)

# images, channels, height and width, blocks, views
CASES = [(6, 16, 32, 32, 3, 3), (4, 32, 16, 16, 2, 1), (6, 64, 8, 8, 3, 2), (4, 16, 2, 8, 1, 2)]


def inputs_of(case) -> tuple[Tensor, list[ResidualBlock], Tensor]:
    images, channels, height, width, count, _ = case
    x = image(images, channels, height, width)

    def conv() -> ConvState:
        return ConvState(image(channels, channels, 3, 3, dtype=torch.float32))

    blocks = [ResidualBlock(conv(), norm_state(channels), conv(), norm_state(channels)) for _ in range(count)]
    return x, blocks, torch.randn(images, channels, height, width).bfloat16()


def copies(blocks: list[ResidualBlock], double: bool = False) -> list[ResidualBlock]:
    def of(conv: ConvState) -> ConvState:
        return dataclasses.replace(conv, weight=in_float64(conv.weight)) if double else conv

    return [
        ResidualBlock(of(b.conv1), copy_of(b.norm1, double), of(b.conv2), copy_of(b.norm2, double))
        for b in blocks
    ]


def parameters(blocks: list[ResidualBlock]) -> list[Tensor]:
    return [t for b in blocks for weight, norm in b.layers for t in (weight, norm.weight, norm.bias)]


def running(blocks: list[ResidualBlock]) -> list[Tensor]:
    return [t for b in blocks for norm in (b.norm1, b.norm2) for t in (norm.running_mean, norm.running_var)]


def in_plain_torch(x: Tensor, blocks: list[ResidualBlock], views: int) -> Tensor:
    for b in blocks:
        h = norm_act.reference(F.conv2d(x, b.conv1.weight, padding=1), b.norm1, None, True, views)
        x = norm_act.reference(F.conv2d(h, b.conv2.weight, padding=1), b.norm2, x, True, views)
    return x


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_statistics_are_those_of_the_blocks_one_by_one(case):
    x, blocks, _ = inputs_of(case)
    ours, theirs = copies(blocks), copies(blocks)
    found = residual_blocks.residual_blocks(x, ours, case[-1])
    assert torch.equal(found, residual_blocks.reference(x, theirs, case[-1]))
    assert found.is_contiguous(memory_format=LAST)
    assert all(torch.equal(a, b) for a, b in zip(running(ours), running(theirs), strict=True))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_are_as_near_to_float64_as_those_of_the_blocks_one_by_one(case):
    x, blocks, grad = inputs_of(case)
    views = case[-1]

    def gradients(run: Callable[..., Tensor], x: Tensor, blocks: list[ResidualBlock]) -> list[Tensor]:
        return outcome(lambda: run(x, blocks, views), [x, *parameters(blocks)], grad)[1:]

    x64 = in_float64(x)
    assert x64 is not None
    exact = gradients(in_plain_torch, x64, copies(blocks, double=True))
    found = gradients(residual_blocks.residual_blocks, x, copies(blocks))
    one_by_one = gradients(residual_blocks.reference, x, copies(blocks))
    for ours, theirs, truth in zip(found, one_by_one, exact, strict=True):
        assert distance(ours, truth) < 1.2 * distance(theirs, truth) + 1e-3
        assert distance(ours, theirs.double()) < 0.02


@pytest.mark.parametrize("case", CASES, ids=str)
def test_without_gradients_the_result_is_the_same(case):
    x, blocks, _ = inputs_of(case)
    kept, unkept = copies(blocks), copies(blocks)
    expected = residual_blocks.residual_blocks(x, kept, case[-1])
    with torch.no_grad():
        found = residual_blocks.residual_blocks(x, unkept, case[-1])
    assert torch.equal(found, expected)
    assert all(torch.equal(a, b) for a, b in zip(running(kept), running(unkept), strict=True))


def test_the_result_does_not_depend_on_the_number_of_threads():
    x, blocks, grad = inputs_of(CASES[2])
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            own = copies(blocks)
            run = lambda own=own: residual_blocks.residual_blocks(x, own, 2)  # noqa: E731
            results.append(outcome(run, [x, *parameters(own)], grad))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_gradient_that_lies_otherwise_in_memory_is_no_other():
    x, blocks, grad = inputs_of(CASES[3])
    results = []
    for laid_out in (grad.contiguous(memory_format=LAST), grad.contiguous(), grad[:, :1].expand_as(grad)):
        run = lambda: residual_blocks.residual_blocks(x, copies(blocks), 2)  # noqa: E731
        results.append(outcome(run, [x], laid_out)[1])
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_what_it_does_not_take():
    x, blocks, _ = inputs_of(CASES[0])
    assert takes_blocks(x, blocks)
    assert not takes_blocks(x.float(), blocks)
    assert not takes_blocks(x.contiguous(), blocks)
    wider = ConvState(image(32, 16, 3, 3, dtype=torch.float32))
    strided = ConvState(blocks[0].conv1.weight, 2)
    for other in (wider, strided):
        assert not takes_blocks(x, [*blocks, blocks[0]._replace(conv1=other)])
        assert not takes_blocks(x, [blocks[0]._replace(conv2=other)])
