"""What a graph of torch.fx computes and moves, operation by operation, found by running one image through it.

Sizes are numbers of elements for one image. How many bytes and kernels they amount to is for whoever prices
them (`pcl_fast.profile.traffic`).
"""

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate
from torch.nn.modules.batchnorm import _NormBase  # pyright: ignore[reportPrivateUsage]
from torch.utils.flop_counter import FlopCounterMode

from pcl_fast.models.tracing import LayerTracer

Kind = Literal["product", "norm", "activation", "addition", "concatenation", "pass", "fork"]

ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")
CONCATENATIONS = (torch.cat, torch.concat)
NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
NORM_CALLS = (F.batch_norm, F.layer_norm, F.group_norm, F.rms_norm)
POINTWISE: tuple[Kind, ...] = ("norm", "activation", "addition")


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One operation on one image: elements `read` and `written`, FLOPs forward (a multiply-add is two).

    Kinds: `product` (convolution, linear layer, matrix product), `norm`, `activation` (one tensor in, one as
    large out), `addition`, `concatenation`, `pass` (anything else: pooling, scaling); and `fork`: a tensor
    that several operations use, so that gradients are added up: all but one are `read`, the sum is `written`.

    `needs_gradient`: its input wants one; a network's first layer does without. `rides`: a neighbour that
    goes through the same tensor element by element can do it on the way (of a fork: backward).
    """

    kind: Kind
    flops: int = 0
    read: int
    written: int
    parameters: int = 0
    needs_gradient: bool = True
    rides: bool = False

    @property
    def backward_flops(self) -> int:
        """As many as forward for the gradient of the weights, and again for that of the input."""
        return self.flops * (1 + self.needs_gradient)


def operations_of(
    part: nn.Module, x: Tensor, needs_gradient: bool = True
) -> tuple[tuple[Operation, ...], Tensor]:
    """The operations of a module that fx can trace, in eval mode, on `x`, and its result.

    `needs_gradient`: whether `x` wants one.
    """
    opened = fx.GraphModule(part, _Opener().trace(part.eval()))
    recorder = _Recorder(opened)
    # As in training: without gradients, attention takes a short cut that the counter does not know.
    with torch.enable_grad(), recorder.counter:
        result = recorder.run(x)
    return tuple(_Reader(opened, recorder.values, needs_gradient).operations()), result.detach()


class _Opener(LayerTracer):
    """Looks into torchvision's composed layers, too, which hold convolutions and norms."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        composed = type(m).__module__.startswith("torchvision.ops") and any(m.children())
        return not composed and super().is_leaf_module(m, module_qualified_name)


@dataclass(frozen=True, slots=True)
class _Value:
    """A node's result: elements, FLOPs and parameters it took; whether it is another's memory, unchanged.

    `elements` is 0 for a tuple of tensors.
    """

    elements: int
    written: int
    flops: int
    weights: int
    view: bool


class _Recorder(fx.Interpreter):
    """Runs a graph and notes what each node that makes tensors does."""

    def __init__(self, part: fx.GraphModule) -> None:
        super().__init__(part)
        self.values: dict[fx.Node, _Value] = {}
        self.counter = FlopCounterMode(display=False)

    def run_node(self, n: fx.Node) -> Any:
        inputs = [value for node in n.all_input_nodes for value in _tensors(self.env[node])]
        versions = [value._version for value in inputs]  # pyright: ignore[reportPrivateUsage]
        before = self.counter.get_total_flops()
        result = super().run_node(n)
        outputs = _tensors(result)
        if n.op == "output" or not outputs:
            return result
        storages = {value.untyped_storage().data_ptr() for value in inputs}
        untouched = versions == [value._version for value in inputs]  # pyright: ignore[reportPrivateUsage]
        self.values[n] = _Value(
            elements=result.numel() if isinstance(result, Tensor) else 0,
            written=sum(value.numel() for value in outputs),
            flops=self.counter.get_total_flops() - before,
            weights=self._weights(n),
            view=untouched and all(value.untyped_storage().data_ptr() in storages for value in outputs),
        )
        return result

    def _weights(self, n: fx.Node) -> int:
        """Parameters of a layer, or given to a call, or fetched."""
        if n.op == "call_module":
            return _count(self.fetch_attr(str(n.target)))
        fetched = [n] if n.op == "get_attr" else [node for node in n.all_input_nodes if node.op == "get_attr"]
        found = [self.fetch_attr(str(node.target)) for node in fetched]
        return sum(value.numel() for value in found if isinstance(value, nn.Parameter))


class _Reader:
    """Makes operations of a graph whose values are known."""

    def __init__(self, part: fx.GraphModule, values: dict[fx.Node, _Value], needs_gradient: bool) -> None:
        self.part, self.values = part, values
        self.kinds: dict[fx.Node, Kind | None] = {n: self._kind(n) for n in values}
        self.learning: set[fx.Node] = set()  # values that depend on parameters, so that they have gradients
        self.pointwise: set[fx.Node] = set()  # values that a kernel makes element by element
        for n, kind in self.kinds.items():
            given = n.op == "placeholder" and needs_gradient
            if given or values[n].weights or not self.learning.isdisjoint(n.all_input_nodes):
                self.learning.add(n)
            passed_on = kind is None and not self.pointwise.isdisjoint(n.all_input_nodes)
            if kind in POINTWISE or passed_on:
                self.pointwise.add(n)

    def operations(self) -> Iterator[Operation]:
        for n, kind in self.kinds.items():
            if kind is not None:
                yield self._operation(n, kind)
            users = [user for user in n.users if user in self.values]
            if len(users) > 1 and n in self.learning and (size := self.values[n].elements):
                rides = any(self.kinds[user] in ("norm", "activation") for user in users)
                more = (len(users) - 1) * size
                yield Operation(kind="fork", read=more, written=size, rides=rides)

    def _operation(self, n: fx.Node, kind: Kind) -> Operation:
        value, sources = self.values[n], self._sources(n)
        near_pointwise = not self.pointwise.isdisjoint(sources)
        before_norm = any(self.kinds.get(user) == "norm" for user in n.users)
        return Operation(
            kind=kind,
            flops=value.flops,
            read=sum(self.values[source].elements for source in sources),
            written=value.written,
            parameters=value.weights,
            needs_gradient=not self.learning.isdisjoint(sources),
            rides=kind in ("activation", "addition") and (near_pointwise or before_norm),
        )

    def _kind(self, n: fx.Node) -> Kind | None:
        """None for what costs nothing: inputs, views, and the copy that `split_network` makes."""
        value, sources = self.values[n], self._sources(n)
        layer = self.part.get_submodule(str(n.target)) if n.op == "call_module" else None
        if n.op in ("placeholder", "get_attr") or value.view or n.target == "clone":
            return None
        if value.flops:
            return "product"
        if isinstance(layer, NORMS) or n.target in NORM_CALLS:
            return "norm"
        if n.target in ADDITIONS and len(sources) == 2:
            return "addition"
        if n.target in CONCATENATIONS:
            return "concatenation"
        alone = len(sources) == 1 and self.values[sources[0]].elements == value.elements
        return "activation" if alone else "pass"

    def _sources(self, n: fx.Node) -> list[fx.Node]:
        return [node for node in n.all_input_nodes if node.op != "get_attr" and node in self.values]


def _tensors(value: Any) -> list[Tensor]:
    """Those in a value that is a tensor or holds some."""
    found: list[Tensor] = []
    map_aggregate(value, lambda item: found.append(item) if isinstance(item, Tensor) else None)
    return found


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
