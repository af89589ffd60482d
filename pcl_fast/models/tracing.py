"""Trace a network down to its layers with torch.fx, and refuse what cannot be cut afterwards."""

import inspect
from typing import Any

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]

from pcl_fast.errors import ConfigError


class LayerTracer(fx.Tracer):
    """Traces down to layers, and remembers at which node each named module was first called."""

    def __init__(self) -> None:
        super().__init__()
        self.first_calls: dict[str, int] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """A layer: of torch.nn, of torchvision.ops, any BatchNorm, or a module without children."""
        builtin = super().is_leaf_module(m, module_qualified_name)
        vision_op = type(m).__module__.startswith("torchvision.ops")
        return builtin or vision_op or isinstance(m, _BatchNorm) or not any(m.children())

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Note how many nodes there are before the module's first call."""
        self.first_calls.setdefault(self.path_of_module(m), len(self.graph.nodes))
        return super().call_module(m, forward, args, kwargs)

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: dict[str, Any] | tuple[Any, ...] | None = None
    ) -> Any:
        """Make the inputs' nodes, without fx's checks that fixed arguments keep their values."""
        made = super().create_args_for_root(root_fn, is_module, concrete_args)
        for node in reversed(self.graph.nodes):
            if node.op != "placeholder":
                self.graph.erase_node(node)
        return made

    def first_node(self, name: str) -> int:
        """The index of the first node of the first call of a module."""
        if name not in self.first_calls:
            called = ", ".join(n for n in self.first_calls if n.count(".") <= name.count("."))
            raise ConfigError(
                f"split '{name}': the network never calls this module itself; choose one of: {called}."
            )
        return self.first_calls[name]


def trace_alike(network: nn.Module) -> LayerTracer:
    """Trace in both modes, see that the graphs are the same, and leave every module's mode as it was.

    Raises ConfigError for a network that fx cannot trace, that takes several inputs, or that computes
    otherwise in train than in eval mode.
    """
    modes = [(module, module.training) for module in network.modules()]
    try:
        train, evaluation = _trace(network.train()), _trace(network.eval())
    finally:
        for module, training in modes:
            module.training = training
    if str(train.graph) != str(evaluation.graph):
        raise ConfigError(
            f"{type(network).__name__} computes other things in train than in eval mode (auxiliary heads, or"
            " dropout called as a function), so it cannot be split; switch that off or make it a module."
        )
    return train


def _trace(network: nn.Module) -> LayerTracer:
    tracer = LayerTracer()
    optional = list(inspect.signature(network.forward).parameters.values())[1:]
    defaults = {p.name: p.default for p in optional if p.default is not p.empty}
    try:
        graph = tracer.trace(network, concrete_args=defaults or None)
    except Exception as error:  # whatever the user's forward raises when it meets a symbolic tensor
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise ConfigError(
            f"{type(network).__name__} cannot be traced by torch.fx ({reason}), so it cannot be split;"
            " choose a network whose forward does not branch on its tensors."
        ) from error
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    if len(inputs) - len(defaults) != 1:
        raise ConfigError(f"{type(network).__name__} takes {len(inputs)} inputs; only one can be split.")
    return tracer
