"""Fuse BatchNorm with the convolution before it and the addition and ReLU behind it, in torch.fx graphs."""

import operator
from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from pcl_fast.kernels import conv_norm
from pcl_fast.models.view_norm import ViewBatchNorm2d

ADDITIONS = (operator.add, operator.iadd, torch.add)
RELUS = (F.relu, torch.relu, "relu", "relu_")


def note_calls(part: fx.GraphModule) -> None:
    """Tell each norm how often a forward calls it."""
    calls: Counter[nn.Module] = Counter(
        part.get_submodule(str(node.target)) for node in part.graph.nodes if node.op == "call_module"
    )
    for layer, count in calls.items():
        if isinstance(layer, ViewBatchNorm2d):
            layer.calls = count


def fuse_norms(part: fx.GraphModule) -> int:
    """Rewrite relu(norm(x)) and relu(norm(x) + residual) as one call of the layer; how many there were.

    Only where nothing else sees the values in between. The layers, their names and the results stay.
    """
    fused = 0
    for node in list(part.graph.nodes):
        if not _is_relu(part, node) or not isinstance(inner := node.args[0], fx.Node):
            continue
        call = _norm_behind(part, inner)
        if call is None:
            continue
        norm, options = call
        with part.graph.inserting_before(inner):
            whole = part.graph.call_module(str(norm.target), norm.args, options | {"relu": True})
        node.replace_all_uses_with(whole)
        for old in dict.fromkeys((node, inner, norm)):
            part.graph.erase_node(old)
        fused += 1
    part.delete_all_unused_submodules()
    part.graph.lint()
    part.recompile()
    return fused


def attach_convolutions(part: fx.GraphModule) -> int:
    """Let each norm call the convolution before it, where our kernel knows both; how many there were.

    Only where nothing else sees the value in between, and both are called once. Names and results stay.
    """
    calls = _calls(part)
    attached = 0
    for node in list(part.graph.nodes):
        if not _is_norm(part, node, kwargs_too=True) or len((conv := node.args[0]).users) != 1:
            continue
        once = conv.op == "call_module" and calls[str(conv.target)] == calls[str(node.target)] == 1
        layer = part.get_submodule(str(conv.target)) if once else None
        if isinstance(layer, nn.Conv2d) and _kernel_knows(layer):
            part.get_submodule(str(node.target)).conv = (layer,)  # pyright: ignore[reportArgumentType]
            node.args = conv.args
            part.graph.erase_node(conv)
            attached += 1
    part.graph.lint()
    part.recompile()
    return attached


def chain_blocks(part: fx.GraphModule) -> int:
    """Let the last norm of a chain of residual blocks run all of it (`ViewBatchNorm2d.blocks`); how many.

    After `attach_convolutions`. A block is relu(norm2(conv2(relu(norm1(conv1(x))))) + x) of one shape; the
    first one of a chain may halve the image and have a norm3(conv3(x)), of kernel 1, in the place of the x
    that is added. Nothing else sees what is in between.
    """
    _bypass_identities(part)
    calls = _calls(part)
    chains: dict[fx.Node, list[tuple[fx.Node, ...]]] = {}
    for node in list(part.graph.nodes):
        block = _plain_block(part, node) or _strided_block(part, node, calls)
        if block is None:
            continue
        x = block[0].args[0]
        assert isinstance(x, fx.Node)
        joins = len(block) == 2 and x in chains and set(x.users) == set(block)
        chains[node] = [*(chains.pop(x) if joins else []), block]
    for last, chain in chains.items():
        _norm_of(part, last).blocks = tuple(tuple(_norm_of(part, node) for node in block) for block in chain)
        last.args, last.kwargs = chain[0][0].args, {}
        for old in reversed(part.graph.nodes):
            if old is not last and any(old in block for block in chain):
                part.graph.erase_node(old)
    part.graph.lint()
    part.recompile()
    return len(chains)


def _bypass_identities(part: fx.GraphModule) -> None:
    for node in list(part.graph.nodes):
        if node.op == "call_module" and type(part.get_submodule(str(node.target))) is nn.Identity:
            node.replace_all_uses_with(node.args[0])
            part.graph.erase_node(node)


def _plain_block(part: fx.GraphModule, node: fx.Node) -> tuple[fx.Node, ...] | None:
    """The calls of both norms of the residual block that ends at `node`, if one does."""
    first = _first_of_block(part, node)
    plain = first is not None and first.args[0] is node.kwargs["residual"] and _keeps_shape(part, first)
    return (first, node) if first is not None and plain else None


def _strided_block(part: fx.GraphModule, node: fx.Node, calls: Counter[str]) -> tuple[fx.Node, ...] | None:
    """The same of one that halves the image, and its shortcut's, which takes its convolution over."""
    first = _first_of_block(part, node)
    norm = node.kwargs.get("residual")
    if first is None or not isinstance(norm, fx.Node) or not _is_norm(part, norm):
        return None
    conv = norm.args[0]
    if not isinstance(conv, fx.Node) or conv.op != "call_module" or conv.args != first.args:
        return None
    used_once = len(conv.users) == len(norm.users) == calls[str(conv.target)] == calls[str(norm.target)] == 1
    if not used_once or not _are_side_by_side(_conv_of(part, first), part.get_submodule(str(conv.target))):
        return None
    _norm_of(part, norm).conv = (part.get_submodule(str(conv.target)),)  # pyright: ignore[reportAttributeAccessIssue]
    norm.args = conv.args
    part.graph.erase_node(conv)
    return first, node, norm


def _are_side_by_side(conv: nn.Conv2d, other: nn.Module) -> bool:
    """Whether `other` makes of the same input as much as `conv`, which halves the image, but by kernel 1."""
    if not isinstance(other, nn.Conv2d) or not _is_plain(other) or other.kernel_size != (1, 1):
        return False
    unpadded = other.padding in ((0, 0), "same", "valid")
    return unpadded and other.stride == conv.stride == (2, 2) and other.out_channels == conv.out_channels


def _first_of_block(part: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """The first norm's call, where `node` is a second one's that adds and cuts off; nothing else sees it."""
    if not _keeps_shape(part, node) or set(node.kwargs) != {"residual", "relu"}:
        return None
    first = node.args[0]
    if not isinstance(first, fx.Node) or not _is_norm(part, first, kwargs_too=True):
        return None
    attached = _norm_of(part, first).conv is not None and set(first.kwargs) == {"relu"}
    return first if attached and len(first.users) == 1 else None


def _keeps_shape(part: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a norm is called with a convolution of stride 1 and as many channels out as in."""
    if not _is_norm(part, node, kwargs_too=True) or _norm_of(part, node).conv is None:
        return False
    conv = _conv_of(part, node)
    return conv.stride == (1, 1) and conv.in_channels == conv.out_channels


def _conv_of(part: fx.GraphModule, node: fx.Node) -> nn.Conv2d:
    attached = _norm_of(part, node).conv
    assert attached is not None
    return attached[0]


def _norm_of(part: fx.GraphModule, node: fx.Node) -> ViewBatchNorm2d:
    norm = part.get_submodule(str(node.target))
    assert isinstance(norm, ViewBatchNorm2d)
    return norm


def _calls(part: fx.GraphModule) -> Counter[str]:
    return Counter(str(node.target) for node in part.graph.nodes if node.op == "call_module")


def _kernel_knows(conv: nn.Conv2d) -> bool:
    shape = (conv.kernel_size, conv.dilation) == ((3, 3), (1, 1)) and conv.stride in ((1, 1), (2, 2))
    padded = conv.padding in ((1, 1), "same") and conv.padding_mode == "zeros"
    return shape and _is_plain(conv) and padded and conv_norm.fits(conv.in_channels, conv.out_channels)


def _is_plain(conv: nn.Conv2d) -> bool:
    return type(conv) is nn.Conv2d and conv.groups == 1 and conv.bias is None


def _norm_behind(part: fx.GraphModule, inner: fx.Node) -> tuple[fx.Node, dict[str, Any]] | None:
    """The norm whose output, perhaps with a residual added, `inner` is; and the residual."""
    if len(inner.users) != 1:
        return None
    if _is_norm(part, inner):
        return inner, {}
    if inner.target not in ADDITIONS or inner.kwargs or len(inner.args) != 2:
        return None
    first, second = inner.args
    for norm, residual in ((first, second), (second, first)):
        if not isinstance(norm, fx.Node) or not isinstance(residual, fx.Node):
            continue
        # The norm moves to the place of the addition: nothing in between may change its input.
        unseen = _is_norm(part, norm) and len(norm.users) == 1 and len(norm.all_input_nodes[0].users) == 1
        if unseen:
            return norm, {"residual": residual}
    return None


def _is_norm(part: fx.GraphModule, node: Any, kwargs_too: bool = False) -> bool:
    if not isinstance(node, fx.Node) or node.op != "call_module" or (node.kwargs and not kwargs_too):
        return False
    return type(part.get_submodule(str(node.target))) is ViewBatchNorm2d


def _is_relu(part: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        return type(part.get_submodule(str(node.target))) is nn.ReLU
    return node.op in ("call_function", "call_method") and node.target in RELUS
