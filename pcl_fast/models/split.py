"""Cut any network that torch.fx can trace into trunk, body and classifier.

    trunk(x) -> one tensor;  body(tensor) -> features;  classifier(features) -> logits

`classifier(body(trunk(x)))` is the network. The parts share the network's layers and keep their qualified
names, so the three state dicts together are the plain network's: deploying a branch is merging dicts.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from pcl_fast.errors import ConfigError, did_you_mean
from pcl_fast.models.tracing import trace_alike

NO_TRUNK = "none"  # a split before the first layer: nothing is shared

# What hands its input on, so that a change in place behind it reaches the tensor before it.
ALIASING_MODULES = (nn.Identity, nn.Flatten, nn.Unflatten, nn.Dropout, nn.Dropout2d)
ALIASING_NAMES = {"flatten", "view", "reshape", "permute", "transpose", "contiguous", "squeeze"}


@dataclass(frozen=True)
class SplitNetwork:
    """The three parts; `feature_dim` is the width F of the features [B, F] that the classifier takes.

    `keys` are those of the plain network's state dict, in its order.
    """

    trunk: fx.GraphModule
    body: fx.GraphModule
    classifier: fx.GraphModule
    feature_dim: int
    keys: tuple[str, ...]


def split_network(network: nn.Module, at: str, features_at: str | None = None) -> SplitNetwork:
    """Cut `network` at the first calls of the modules named `at` and `features_at`.

    The features are the input of `features_at`, by default of the last layer, which must be an nn.Linear.
    At `NO_TRUNK` the trunk has no layer and hands its input on. The parts hold the layers of `network`
    itself, not copies. Raises ConfigError where a cut is impossible: a name unknown or never called, more
    than one tensor across a cut, no trunk, no final nn.Linear, a network that fx cannot trace or that
    computes otherwise in train than in eval mode.
    """
    if at != NO_TRUNK:
        _check_name(network, at)
    tracer = trace_alike(network)
    nodes = list(tracer.graph.nodes)
    last = _final_linear(network, nodes[-1])
    start = 1 if at == NO_TRUNK else tracer.first_node(at)
    end = nodes.index(last) if features_at is None else tracer.first_node(features_at)
    if start > end:
        raise ConfigError(f"split '{at}': the features are taken before it; name an earlier module.")
    trunk_out = _crossing(nodes, start, at)
    features = _crossing(nodes, end, features_at or str(last.target))
    trunk = _part(network, nodes[:start], nodes[0], trunk_out)
    body = _part(network, nodes[start:end], trunk_out, features)
    classifier = _part(network, nodes[end:-1], features, nodes[-1].args[0])
    if at != NO_TRUNK and not any(True for _ in trunk.parameters()):
        raise ConfigError(
            f"split '{at}': no layer lies before it, so no trunk is left; name a later module, "
            f"or '{NO_TRUNK}' for peers that share nothing."
        )
    _check_complete(network, (trunk, body, classifier), at)
    linears = (layer for layer in classifier.modules() if isinstance(layer, nn.Linear))
    return SplitNetwork(trunk, body, classifier, next(linears).in_features, tuple(network.state_dict()))


def _check_name(network: nn.Module, at: str) -> None:
    names = [name for name, _ in network.named_modules() if name]
    if at not in names:
        children = ", ".join(name for name, _ in network.named_children())
        raise ConfigError(
            f"split '{at}': {type(network).__name__} has no such module.{did_you_mean(at, names)}"
            f" Its top-level modules: {children}."
        )


def _final_linear(network: nn.Module, output: fx.Node) -> fx.Node:
    """The call of the layer that makes the logits; nn.Identity may follow it."""
    node = output.args[0]
    while isinstance(node, fx.Node) and node.op == "call_module":
        layer = network.get_submodule(str(node.target))
        if isinstance(layer, nn.Linear):
            return node
        if not isinstance(layer, nn.Identity):
            break
        node = node.args[0]
    raise ConfigError(
        f"{type(network).__name__} does not end in an nn.Linear (it ends in '{node}'), so it has no"
        " classifier to split off; choose a network whose last layer is an nn.Linear."
    )


def _crossing(nodes: Sequence[fx.Node], cut: int, name: str) -> fx.Node:
    """The one value that is made before the cut and used behind it; parameters do not count."""
    before = set(nodes[:cut])
    crossing = [node for node in nodes[:cut] if node.op != "get_attr" and not before.issuperset(node.users)]
    if len(crossing) != 1:
        found = ", ".join(node.name for node in crossing)
        raise ConfigError(
            f"split '{name}': {len(crossing)} tensors cross it ({found}), only one may; name a module at"
            " whose input the network is a single stream."
        )
    return crossing[0]


def _part(network: nn.Module, nodes: Sequence[fx.Node], entry: fx.Node, result: Any) -> fx.GraphModule:
    """The nodes as a module of their own, from the value `entry` to the value `result`."""
    graph = fx.Graph()
    copies = {entry: graph.placeholder("x")}
    if _changed_in_place(network, entry, set(nodes)):
        # Peers may share this tensor, or hold slices of one: none of them may write on it.
        copies[entry] = graph.call_method("clone", (copies[entry],))

    def copied(node: fx.Node) -> fx.Node:
        if node not in copies:  # a parameter that was fetched before the cut
            copies[node] = graph.node_copy(node)
        return copies[node]

    for node in nodes:
        if node.op != "placeholder":
            copies[node] = graph.node_copy(node, copied)
    graph.output(copied(result))
    return fx.GraphModule(network, graph, type(network).__name__)


def _changed_in_place(network: nn.Module, value: fx.Node, nodes: set[fx.Node]) -> bool:
    """Whether one of the nodes writes on `value`, directly or through a view of it."""
    users = [user for user in nodes.intersection(value.users) if user.args and user.args[0] is value]
    for user in users:
        layer = network.get_submodule(str(user.target)) if user.op == "call_module" else None
        if _writes(user, layer):
            return True
        aliases = isinstance(layer, ALIASING_MODULES) or _name(user) in ALIASING_NAMES
        if aliases and _changed_in_place(network, user, nodes):
            return True
    return False


def _writes(node: fx.Node, layer: nn.Module | None) -> bool:
    """Whether a call changes its first argument: `inplace=True`, `add_`, `x += y`."""
    if layer is not None:
        return bool(getattr(layer, "inplace", False))
    name = _name(node)
    in_operator = name.startswith("i") and getattr(operator, name, None) is node.target
    return in_operator or bool(node.kwargs.get("inplace", False)) or name.endswith("_")


def _name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def _check_complete(network: nn.Module, parts: Sequence[nn.Module], at: str) -> None:
    """Every entry of the network's state dict must lie in exactly one part."""
    held = [key for part in parts for key in part.state_dict()]
    unused = [key for key in network.state_dict() if key not in held]
    if unused:
        raise ConfigError(
            f"{type(network).__name__} never uses '{unused[0]}', so it cannot be split; remove that layer."
        )
    shared = [key for key in network.state_dict() if held.count(key) > 1]
    if shared:
        raise ConfigError(f"split '{at}': '{shared[0]}' is used on both sides of it; name another module.")
