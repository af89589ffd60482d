"""A chain of residual blocks in one kernel, against the same block by block, and in float64."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pcl_fast.kernels import norm_act, residual_blocks
from pcl_fast.kernels.conv_norm import ConvState
from pcl_fast.kernels.norm_act import NormState
from pcl_fast.kernels.residual_blocks import ResidualBlock, takes_blocks
from tests.kernels.reference import LAST, copy_of, distance, image, in_float64, norm_state, outcome

pytestmark = pytest.mark.skipif(
    residual_blocks.why_unavailable() is not None, reason=str(residual_blocks.why_unavailable())
)

# images, channels, height and width of the result, blocks, views
CASES = [(6, 16, 32, 32, 3, 3), (4, 32, 16, 16, 2, 1), (6, 64, 8, 8, 3, 2), (4, 16, 2, 8, 1, 2)]
# The same, and the channels of an input twice as high and wide.
STRIDED = [
    (6, 32, 16, 16, 3, 3, 16),
    (20, 64, 8, 8, 2, 1, 32),
    (4, 16, 2, 8, 1, 2, 64),
    (4, 64, 4, 8, 2, 2, 64),
]


def inputs_of(case) -> tuple[Tensor, list[ResidualBlock], Tensor]:
    images, channels, height, width, count, _, *strided = case

    def conv(ins: int = channels, kernel: int = 3, stride: int = 1) -> ConvState:
        return ConvState(image(channels, ins, kernel, kernel, dtype=torch.float32), stride)

    blocks = [ResidualBlock(conv(), norm_state(channels), conv(), norm_state(channels)) for _ in range(count)]
    grad = torch.randn(images, channels, height, width).bfloat16()
    if not strided:
        return image(images, channels, height, width), blocks, grad
    shortcut = conv(strided[0], 1, 2), norm_state(channels)
    blocks[0] = blocks[0]._replace(conv1=conv(strided[0], 3, 2), shortcut=shortcut)
    return image(images, strided[0], 2 * height, 2 * width), blocks, grad


def copies(blocks: list[ResidualBlock], double: bool = False) -> list[ResidualBlock]:
    def of(conv: ConvState) -> ConvState:
        return dataclasses.replace(conv, weight=in_float64(conv.weight)) if double else conv

    def block(layers: list[tuple[ConvState, NormState]]) -> ResidualBlock:
        return ResidualBlock(*layers[0], *layers[1], *layers[2:])

    return [block([(of(conv), copy_of(norm, double)) for conv, norm in b.layers]) for b in blocks]


def parameters(blocks: list[ResidualBlock]) -> list[Tensor]:
    return [t for b in blocks for conv, norm in b.layers for t in (conv.weight, norm.weight, norm.bias)]


def running(blocks: list[ResidualBlock]) -> list[Tensor]:
    return [t for b in blocks for _, norm in b.layers for t in (norm.running_mean, norm.running_var)]


def in_plain_torch(x: Tensor, blocks: list[ResidualBlock], views: int) -> Tensor:
    for b in blocks:
        z = F.conv2d(x, b.conv1.weight, stride=b.conv1.stride, padding=1)
        h = norm_act.reference(z, b.norm1, None, True, views)
        if b.shortcut is not None:
            conv, norm = b.shortcut
            x = norm_act.reference(F.conv2d(x, conv.weight, stride=2), norm, None, False, views)
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


def check_against_float64(case, x: Tensor, blocks: list[ResidualBlock], grad: Tensor) -> None:
    """Values, gradients and running statistics: as near as those of the blocks one by one, and near those."""

    def everything(run: Callable[..., Tensor], x: Tensor, blocks: list[ResidualBlock]) -> list[Tensor]:
        out = outcome(lambda: run(x, blocks, case[5]), [x, *parameters(blocks)], grad)
        return [*out, *running(blocks)]

    x64 = in_float64(x)
    assert x64 is not None
    exact = everything(in_plain_torch, x64, copies(blocks, double=True))
    found = everything(residual_blocks.residual_blocks, x, copies(blocks))
    one_by_one = everything(residual_blocks.reference, x, copies(blocks))
    for ours, theirs, truth in zip(found, one_by_one, exact, strict=True):
        assert distance(ours, truth) < 1.2 * distance(theirs, truth) + 1e-3
        assert distance(ours, theirs.double()) < 0.02


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_are_as_near_to_float64_as_those_of_the_blocks_one_by_one(case):
    check_against_float64(case, *inputs_of(case))


@pytest.mark.parametrize("case", STRIDED, ids=str)
def test_a_strided_block_is_as_near_to_float64_as_its_layers_one_by_one(case):
    x, (block, *_), grad = inputs_of(case)
    with torch.no_grad():
        ours, theirs = (
            run(x, copies([block]), case[5]) > 0
            for run in (residual_blocks.residual_blocks, residual_blocks.reference)
        )
    assert (ours != theirs).double().mean() < 0.01
    # Where only one of them is zero, by the rounding of the shortcut, gradients are not compared.
    check_against_float64(case, x, [block], grad * (ours == theirs))


@pytest.mark.parametrize("case", [case for case in STRIDED if case[4] > 1], ids=str)
def test_a_strided_block_and_its_chain_are_the_two_one_after_the_other(case):
    x, blocks, grad = inputs_of(case)
    views, whole, parts = case[5], copies(blocks), copies(blocks)

    def two(x: Tensor) -> Tensor:
        y = residual_blocks.residual_blocks(x, parts[:1], views)
        return residual_blocks.residual_blocks(y, parts[1:], views)

    found = outcome(lambda: residual_blocks.residual_blocks(x, whole, views), [x, *parameters(whole)], grad)
    expected = outcome(lambda: two(x), [x, *parameters(parts)], grad)
    assert torch.equal(found[0], expected[0])
    assert all(torch.equal(a, b) for a, b in zip(running(whole), running(parts), strict=True))
    assert max(distance(a, b.double()) for a, b in zip(found[1:], expected[1:], strict=True)) < 2e-3


@pytest.mark.parametrize("case", [*CASES, *STRIDED], ids=str)
def test_without_gradients_the_result_is_the_same(case):
    x, blocks, _ = inputs_of(case)
    kept, unkept = copies(blocks), copies(blocks)
    expected = residual_blocks.residual_blocks(x, kept, case[5])
    with torch.no_grad():
        found = residual_blocks.residual_blocks(x, unkept, case[5])
    assert torch.equal(found, expected)
    assert all(torch.equal(a, b) for a, b in zip(running(kept), running(unkept), strict=True))


@pytest.mark.parametrize("case", [CASES[2], STRIDED[0], STRIDED[1]], ids=str)
def test_the_result_does_not_depend_on_the_number_of_threads(case):
    x, blocks, grad = inputs_of(case)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            own = copies(blocks)
            run = lambda own=own: residual_blocks.residual_blocks(x, own, case[5])  # noqa: E731
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


def test_what_it_does_not_take_of_a_strided_block():
    x, blocks, _ = inputs_of(STRIDED[0])
    conv, norm = blocks[0].shortcut or pytest.fail("no shortcut")
    assert takes_blocks(x, blocks)
    assert not takes_blocks(x, [blocks[0]._replace(shortcut=None)])
    assert not takes_blocks(x, [blocks[0]._replace(shortcut=(ConvState(conv.weight, 1), norm))])
    assert not takes_blocks(x, [blocks[0]._replace(shortcut=(ConvState(conv.weight.bfloat16(), 2), norm))])
    assert not takes_blocks(x, [blocks[0]._replace(conv1=ConvState(blocks[0].conv1.weight, 1))])
    assert not takes_blocks(x, [blocks[0], blocks[1]._replace(shortcut=(conv, norm))])
    picture = image(6, 3, 32, 32, dtype=torch.float32).detach()
    assert not takes_blocks(picture, blocks)
