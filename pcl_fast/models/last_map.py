"""The last map of a branch, before it is pooled: some heads look at it."""

import torch
from torch import Tensor, fx
from torch.fx.passes.shape_prop import ShapeProp


def last_map(body: fx.GraphModule, map_BCHW: Tensor) -> fx.Node | None:
    """The last value in a branch that still has pixels, given the trunk's output; None if none has."""
    was_training = body.training
    with torch.no_grad():
        ShapeProp(body.eval()).propagate(map_BCHW)
    body.train(was_training)
    shapes = {node: node.meta["tensor_meta"].shape for node in body.graph.nodes if "tensor_meta" in node.meta}
    maps = [node for node, shape in shapes.items() if len(shape) == 4 and shape[2] * shape[3] > 1]
    return maps[-1] if maps else None


def expose_map(body: fx.GraphModule, node: fx.Node) -> None:
    """Let a branch return its features and this value of it."""
    (output,) = (each for each in body.graph.nodes if each.op == "output")
    output.args = ((output.args[0], node),)
    body.graph.lint()
    body.recompile()


def shape_of(node: fx.Node) -> torch.Size:
    """The shape of a value that `last_map` has found."""
    return node.meta["tensor_meta"].shape


def channels(shape: torch.Size) -> int:
    """The channels of a map [B, C, H, W]; 0 of what is none."""
    return shape[1] if len(shape) == 4 else 0
