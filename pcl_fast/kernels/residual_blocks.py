"""A chain of residual blocks (two 3x3 convolutions each) as one operation: the CPU's, in C++.

What `conv_norm` does block by block goes to memory and back between the blocks. Here a view goes through all
of them before the next view begins, the first activation of a block is never written, and the gradients of a
block's two paths are added where they are made. The first block may halve the image.
"""

import ctypes
import functools
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from pcl_fast import native
from pcl_fast.kernels import conv_norm
from pcl_fast.kernels.conv_norm import ConvState, conv_norm_act
from pcl_fast.kernels.norm_act import NormState, norm_act

SOURCE = Path(__file__).with_suffix(".cpp")
POINTER = ctypes.c_void_p
FORWARD = (POINTER, POINTER, POINTER, ctypes.c_int, ctypes.c_int)
BACKWARD = (*(POINTER,) * 5, ctypes.c_int)
TENSORS = ("conv", "weight", "bias", "running_mean", "running_var", "z")
STATISTICS = ("mean", "invstd", "scale", "shift")
LAST = torch.channels_last


class ResidualBlock(NamedTuple):
    """relu(norm2(conv2(relu(norm1(conv1(x))))) + x), the convolutions from C channels to C.

    With a `shortcut`, a convolution of kernel 1 and its norm, x + becomes shortcut(x) +, and that convolution
    and the first are of stride 2 and from any number of channels.
    """

    conv1: ConvState
    norm1: NormState
    conv2: ConvState
    norm2: NormState
    shortcut: tuple[ConvState, NormState] | None = None

    @property
    def layers(self) -> tuple[tuple[ConvState, NormState], ...]:
        """Each convolution with the norm behind it."""
        pairs = (self.conv1, self.norm1), (self.conv2, self.norm2)
        return pairs if self.shortcut is None else (*pairs, self.shortcut)


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, POINTER) for name in (*TENSORS, *STATISTICS)),
        *((name, POINTER) for name in ("grad_conv", "grad_weight", "grad_bias")),
        *((name, ctypes.c_double) for name in ("eps", "momentum")),
    )


class _Block(ctypes.Structure):
    _fields_ = (
        *((name, _Layer) for name in ("first", "second", "shortcut")),
        *(("strided", ctypes.c_int), ("y", POINTER), ("keeps_y", ctypes.c_int)),
    )


class _Chain(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_long) for name in ("count", "views", "images", "height", "width", "channels", "ins")
    )


def residual_blocks(x: Tensor, blocks: Sequence[ResidualBlock], views: int = 1) -> Tensor:
    """The blocks one after the other, each of the `views` stacked along the batch by its own statistics.

    x and the result [V * B, C, H, W] in bfloat16; `takes_blocks` must hold. The running statistics take one
    momentum update a view, in view order. Values are those of `reference`, but for a shortcut, which is not
    rounded before it is added; gradients differ by a rounding: those of a block's two paths are added before
    they become bfloat16.
    """
    if not torch.is_grad_enabled():
        return _forward_only(x, blocks, views)
    parameters = [
        tensor
        for block in blocks
        for conv, norm in block.layers
        for tensor in (conv.weight, norm.weight, norm.bias)
    ]
    return _ResidualBlocks.apply(x, (blocks, views), *parameters)  # pyright: ignore


def reference(x: Tensor, blocks: Sequence[ResidualBlock], views: int = 1) -> Tensor:
    """The same by `conv_norm`, one convolution after the other."""
    for block in blocks:
        h = conv_norm_act(x, block.conv1, block.norm1, None, True, views)
        if block.shortcut is not None:
            conv, norm = block.shortcut
            x = norm_act(F.conv2d(x, conv.weight.to(x.dtype), stride=conv.stride), norm, None, False, views)
        x = conv_norm_act(h, block.conv2, block.norm2, x, True, views)
    return x


def takes_blocks(x: Tensor, blocks: Sequence[ResidualBlock]) -> bool:
    """Whether the kernel fits: `conv_norm` takes the first convolution, and later blocks keep the shape."""
    first, outs = blocks[0], blocks[0].conv1.weight.shape[0]
    ins, stride = (x.shape[1], 2) if first.shortcut else (outs, 1)
    if x.dtype != torch.bfloat16 or not conv_norm.takes(x, first.conv1, first.norm1.weight, None):
        return False
    fit = [_fits(first.layers[0], outs, ins, 3, stride), _fits(first.layers[1], outs, outs, 3, 1)]
    fit += [_fits(layer, outs, ins, 1, 2) for layer in first.layers[2:]]
    fit += [
        _fits(layer, outs, outs, 3, 1) and block.shortcut is None
        for block in blocks[1:]
        for layer in block.layers
    ]
    return all(fit) and why_unavailable() is None


def _fits(layer: tuple[ConvState, NormState], outs: int, ins: int, kernel: int, stride: int) -> bool:
    conv, norm = layer
    shape = conv.weight.shape == (outs, ins, kernel, kernel) and conv.stride == stride
    single = conv.weight.dtype == norm.weight.dtype == torch.float32
    return shape and single and conv.weight.is_contiguous(memory_format=LAST)


@functools.cache
def why_unavailable() -> str | None:
    """The reason, in one line, why the kernel cannot be had here."""
    return conv_norm.why_unavailable() or native.why_unavailable(SOURCE)


def _parts(tensor: Tensor) -> Iterator[int]:
    """Where the rows of a dense tensor begin, in order."""
    size = tensor.shape[-1] * tensor.element_size()
    return iter(range(tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size(), size))


def _chain(x: Tensor, blocks: Sequence[ResidualBlock], views: int) -> _Chain:
    images, ins, height, width = x.shape
    stride = blocks[0].conv1.stride
    shape = (height // stride, width // stride, len(blocks[0].norm1.weight), ins)
    return _Chain(len(blocks), views, images // views, *shape)


def _new_output(images: int, chain: _Chain) -> Tensor:
    shape = (images, chain.channels, chain.height, chain.width)
    return torch.empty(shape, dtype=torch.bfloat16, memory_format=LAST)


def _new_rows(blocks: Sequence[ResidualBlock], kinds: int, chain: _Chain) -> Tensor:
    """Room [layers, kinds, V * C]."""
    return torch.empty(sum(len(b.layers) for b in blocks), kinds, chain.views * chain.channels)


def _table(
    blocks: Sequence[ResidualBlock], tensors: Sequence[Tensor], statistics: Tensor, keep: bool
) -> ctypes.Array[_Block]:
    """What C++ is told of the blocks. `tensors`: z of each layer and then y, block after block."""
    table = (_Block * len(blocks))()
    rows, left = _parts(statistics), iter(tensors)
    for entry, block in zip(table, blocks, strict=True):
        for layer, (conv, norm) in zip(
            (entry.first, entry.second, entry.shortcut), block.layers, strict=False
        ):
            parameters = (conv.weight, norm.weight, norm.bias, norm.running_mean, norm.running_var)
            for name, tensor in zip(TENSORS, (*parameters, next(left)), strict=True):
                setattr(layer, name, tensor.data_ptr())
            for name, row in zip(STATISTICS, islice(rows, len(STATISTICS)), strict=True):
                setattr(layer, name, row)
            layer.eps, layer.momentum = norm.eps, norm.momentum
        entry.strided, entry.y, entry.keeps_y = block.shortcut is not None, next(left).data_ptr(), keep
    table[-1].keeps_y = True
    return table


def _run_forward(
    x: Tensor, chain: _Chain, blocks: Sequence[ResidualBlock], tensors: Sequence[Tensor], keep: bool
) -> Tensor:
    """The statistics [layers, 4, V * C]."""
    statistics = _new_rows(blocks, len(STATISTICS), chain)
    run = native.function(SOURCE, "residual_blocks_forward", FORWARD)
    table = _table(blocks, tensors, statistics, keep)
    run(x.data_ptr(), table, ctypes.byref(chain), keep, torch.get_num_threads())
    return statistics


def _forward_only(x: Tensor, blocks: Sequence[ResidualBlock], views: int) -> Tensor:
    """Nothing is kept: three buffers of one view, one more for a shortcut, and the result."""
    chain = _chain(x, blocks, views)
    z1, *turns, of_shortcut = (_new_output(chain.images, chain) for _ in range(4))
    out = _new_output(len(x), chain)
    tensors: list[Tensor] = []
    for index, block in enumerate(blocks):
        y = turns[index % 2]
        shortcut = () if block.shortcut is None else (of_shortcut,)
        tensors += [z1, y, *shortcut, out if index == len(blocks) - 1 else y]
    _run_forward(x, chain, blocks, tensors, keep=False)
    return out


class _ResidualBlocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, options: Any, *_parameters: Tensor) -> Tensor:
        blocks, views = options
        chain = _chain(x, blocks, views)
        count = sum(len(block.layers) + 1 for block in blocks)
        tensors = [_new_output(len(x), chain) for _ in range(count)]
        statistics = _run_forward(x, chain, blocks, tensors, keep=True)
        ctx.save_for_backward(x, statistics, *tensors, *_parameters)
        ctx.options = blocks, chain
        return tensors[-1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        blocks, chain = ctx.options
        x, statistics, *tensors = ctx.saved_tensors
        grad_y = grad_y.to(x.dtype).contiguous(memory_format=LAST)
        grad_x, grad_norms = torch.empty_like(x), _new_rows(blocks, 2, chain)
        grad_convs = [torch.empty_like(conv.weight) for block in blocks for conv, _ in block.layers]
        table, rows, convs = _table(blocks, tensors, statistics, True), _parts(grad_norms), iter(grad_convs)
        for entry, block in zip(table, blocks, strict=True):
            for layer in (entry.first, entry.second, entry.shortcut)[: len(block.layers)]:
                layer.grad_conv = next(convs).data_ptr()
                layer.grad_weight, layer.grad_bias = islice(rows, 2)
        run = native.function(SOURCE, "residual_blocks_backward", BACKWARD)
        ends = (grad_x.data_ptr(), torch.get_num_threads())
        run(grad_y.data_ptr(), x.data_ptr(), table, ctypes.byref(chain), *ends)
        norms = grad_norms.unflatten(2, (chain.views, chain.channels)).sum(2).flatten(0, 1).unbind()
        triples = zip(grad_convs, norms[::2], norms[1::2], strict=True)
        return grad_x, None, *(grad for triple in triples for grad in triple)
