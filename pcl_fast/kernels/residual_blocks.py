"""A chain of residual blocks (two 3x3 convolutions of one shape each) as one operation: the CPU's, in C++.

What `conv_norm` does block by block goes to memory and back between the blocks. Here a view goes through all
of them before the next view begins, the first activation of a block is never written, and the gradients of a
block's two paths are added where they are made.
"""

import ctypes
import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pcl_fast import native
from pcl_fast.kernels import conv_norm
from pcl_fast.kernels.conv_norm import ConvState, conv_norm_act
from pcl_fast.kernels.norm_act import NormState

SOURCE = Path(__file__).with_suffix(".cpp")
POINTER = ctypes.c_void_p
FORWARD = (POINTER, POINTER, ctypes.c_long, ctypes.c_int, *(ctypes.c_long,) * 5, ctypes.c_int)
BACKWARD = (POINTER, POINTER, POINTER, ctypes.c_long, POINTER, *(ctypes.c_long,) * 5, ctypes.c_int)
STATISTICS = ("mean", "invstd", "scale", "shift")


class ResidualBlock(NamedTuple):
    """relu(norm2(conv2(relu(norm1(conv1(x))))) + x), the convolutions from C channels to C."""

    conv1: ConvState
    norm1: NormState
    conv2: ConvState
    norm2: NormState

    @property
    def layers(self) -> tuple[tuple[Tensor, NormState], tuple[Tensor, NormState]]:
        """Each convolution's weight with the norm behind it."""
        return (self.conv1.weight, self.norm1), (self.conv2.weight, self.norm2)


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, POINTER) for name in ("conv", "weight", "bias", "running_mean", "running_var", "z")),
        *((name, POINTER) for name in (*STATISTICS, "grad_conv", "grad_weight", "grad_bias")),
        *((name, ctypes.c_double) for name in ("eps", "momentum")),
    )


class _Block(ctypes.Structure):
    _fields_ = (("first", _Layer), ("second", _Layer), ("y", POINTER), ("keeps_y", ctypes.c_int))


def residual_blocks(x: Tensor, blocks: Sequence[ResidualBlock], views: int = 1) -> Tensor:
    """The blocks one after the other, each of the `views` stacked along the batch by its own statistics.

    x and the result [V * B, C, H, W] in bfloat16; `takes_blocks` must hold. The running statistics take one
    momentum update a view, in view order. Values are those of `reference`; gradients differ by a rounding:
    those of a block's two paths are added before they become bfloat16.
    """
    if not torch.is_grad_enabled():
        return _forward_only(x, blocks, views)
    parameters = [
        tensor
        for block in blocks
        for weight, norm in block.layers
        for tensor in (weight, norm.weight, norm.bias)
    ]
    return _ResidualBlocks.apply(x, (blocks, views), *parameters)  # pyright: ignore


def reference(x: Tensor, blocks: Sequence[ResidualBlock], views: int = 1) -> Tensor:
    """The same by `conv_norm`, one convolution after the other."""
    for block in blocks:
        h = conv_norm_act(x, block.conv1, block.norm1, None, True, views)
        x = conv_norm_act(h, block.conv2, block.norm2, x, True, views)
    return x


def takes_blocks(x: Tensor, blocks: Sequence[ResidualBlock]) -> bool:
    """Whether the kernel can be used: `conv_norm` takes every convolution, and none changes the shape."""
    pairs = [pair for b in blocks for pair in ((b.conv1, b.norm1), (b.conv2, b.norm2))]
    same = all(conv.stride == 1 and conv.weight.shape[:2] == (x.shape[1],) * 2 for conv, _ in pairs)
    taken = same and all(conv_norm.takes(x, conv, norm.weight, None) for conv, norm in pairs)
    return taken and why_unavailable() is None


@functools.cache
def why_unavailable() -> str | None:
    """The reason, in one line, why the kernel cannot be had here."""
    return conv_norm.why_unavailable() or native.why_unavailable(SOURCE)


def _layer(
    weight: Tensor, norm: NormState, z: Tensor, statistics: Iterable[int], grads: Iterable[int]
) -> _Layer:
    """`statistics`: where mean, invstd, scale, shift lie; `grads`: of convolution, weight, bias, or none."""
    tensors = (weight, norm.weight, norm.bias, norm.running_mean, norm.running_var, z)
    layer = _Layer(*(tensor.data_ptr() for tensor in tensors), *statistics)
    for name, grad in zip(("grad_conv", "grad_weight", "grad_bias"), grads, strict=False):
        setattr(layer, name, grad)
    layer.eps, layer.momentum = norm.eps, norm.momentum
    return layer


def _parts(tensor: Tensor, dims: int) -> Iterator[int]:
    """Where the parts of a dense tensor begin that its first `dims` dimensions number, in order."""
    count = math.prod(tensor.shape[:dims])
    size = tensor.numel() // count * tensor.element_size()
    return iter(range(tensor.data_ptr(), tensor.data_ptr() + count * size, size))


def _sizes(x: Tensor, views: int) -> tuple[int, ...]:
    images, channels, height, width = x.shape
    return views, images // views, height, width, channels


def _forward(
    x: Tensor, blocks: Sequence[ResidualBlock], tensors: Sequence[Tensor], statistics: Tensor, keep: bool
) -> None:
    """`tensors`: z1, z2 and y of each block; `statistics` [blocks, 2, 4, V, C]."""
    table = (_Block * len(blocks))()
    parts = _parts(statistics, dims=3)
    for index, block in enumerate(blocks):
        z1, z2, y = tensors[3 * index : 3 * index + 3]
        first, second = (
            _layer(weight, norm, z, islice(parts, len(STATISTICS)), ())
            for (weight, norm), z in zip(block.layers, (z1, z2), strict=True)
        )
        table[index] = _Block(first, second, y.data_ptr(), keep or index == len(blocks) - 1)
    run = native.function(SOURCE, "residual_blocks_forward", FORWARD)
    views = statistics.shape[3]
    run(x.data_ptr(), table, len(blocks), keep, *_sizes(x, views), torch.get_num_threads())


def _new_statistics(x: Tensor, blocks: Sequence[ResidualBlock], views: int) -> Tensor:
    return torch.empty(len(blocks), 2, len(STATISTICS), views, x.shape[1])


def _forward_only(x: Tensor, blocks: Sequence[ResidualBlock], views: int) -> Tensor:
    """Nothing is kept: three buffers of one view, and the result."""
    z1, *turns = (torch.empty_like(x[: len(x) // views]) for _ in range(3))
    out = torch.empty_like(x)
    tensors: list[Tensor] = []
    for index in range(len(blocks)):
        y = turns[index % 2]
        tensors += [z1, y, out if index == len(blocks) - 1 else y]
    _forward(x, blocks, tensors, _new_statistics(x, blocks, views), keep=False)
    return out


class _ResidualBlocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, options: Any, *_parameters: Tensor) -> Tensor:
        blocks, views = options
        tensors = [torch.empty_like(x) for _ in range(3 * len(blocks))]
        statistics = _new_statistics(x, blocks, views)
        _forward(x, blocks, tensors, statistics, keep=True)
        ctx.save_for_backward(x, statistics, *tensors, *_parameters)
        ctx.options = options
        return tensors[-1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        blocks, views = ctx.options
        x, statistics, *tensors = ctx.saved_tensors
        channels = x.shape[1]
        grad_y = grad_y.to(x.dtype).contiguous(memory_format=torch.channels_last)
        grad_x = torch.empty_like(x)
        grad_convs = torch.empty(len(blocks), 2, channels, 3, 3, channels)
        grad_norms = torch.empty(len(blocks), 2, 2, views, channels)
        parts, of_convs, of_norms = _parts(statistics, 3), _parts(grad_convs, 2), _parts(grad_norms, 3)
        table = (_Block * len(blocks))()
        for index, block in enumerate(blocks):
            z1, z2, y = tensors[3 * index : 3 * index + 3]
            first, second = (
                _layer(
                    weight, norm, z, islice(parts, len(STATISTICS)), (next(of_convs), *islice(of_norms, 2))
                )
                for (weight, norm), z in zip(block.layers, (z1, z2), strict=True)
            )
            table[index] = _Block(first, second, y.data_ptr(), True)
        run = native.function(SOURCE, "residual_blocks_backward", BACKWARD)
        ends = (grad_x.data_ptr(), *_sizes(x, views), torch.get_num_threads())
        run(grad_y.data_ptr(), x.data_ptr(), table, len(blocks), *ends)
        convs = grad_convs.permute(0, 1, 2, 5, 3, 4).flatten(0, 1).unbind()
        norms = (grad_norms.sum(3) if views > 1 else grad_norms[:, :, :, 0]).flatten(0, 2).unbind()
        triples = zip(convs, norms[::2], norms[1::2], strict=True)
        return grad_x, None, *(grad for triple in triples for grad in triple)
