"""Weights to begin with: a network that a run has left, given to every peer of its kind."""

from collections.abc import Sequence

import torch
from torch import fx, nn

from pcl_fast.config import Config
from pcl_fast.errors import ConfigError
from pcl_fast.models.peers import PeerNetwork
from pcl_fast.objectives import Objective
from pcl_fast.run_network import RunNetwork, read_network


def read_first_weights(config: Config) -> RunNetwork | None:
    """What `--init` names; None if nothing. Raises what `read_network` raises."""
    if config.init is None:
        return None
    return read_network(config.init, "--init", "give the folder of a run, or its model.safetensors")


def begin_with(network: PeerNetwork, objective: Objective, given: RunNetwork) -> str:
    """Give weights and running statistics to the trunk and to each peer of that backbone; say so in a line.

    The layer that makes the logits begins so, too, where the classes are as many; but if all peers see one
    view, only in the deployed one, as peers that are equal and see the same would stay equal. The trunk is
    the first peer's. What looks at all peers begins anew.
    Raises ConfigError for another backbone, and for tensors that do not fit, naming the first.
    """
    takers = [j for j, backbone in enumerate(network.backbones) if backbone.name == given.model]
    if not takers:
        names = ", ".join(dict.fromkeys(backbone.name for backbone in network.backbones))
        raise ConfigError(
            f"--init {given.path}: is a {given.model}, and --model is {names}; give it the same"
        )
    if 0 in takers:
        _refuse_strangers(network, given)
    taken = _take(network.trunk, given, anew=()) if 0 in takers else set[str]()
    classes, first = _classes(network, given, takers[0]), _first(objective, takers)
    for j in takers:
        classifier = network.classifiers[j]
        assert isinstance(classifier, fx.GraphModule)
        taken |= _take(network.branches[j], given, anew=())
        apart = j != first and objective.num_views == 1
        anew = logits_layer(classifier) if apart or classes != network.num_classes else ()
        taken |= _take(classifier, given, anew)
    parts = [f"{given.model} of {given.path}: {len(taken)} of {len(given.tensors)} tensors"]
    if classes != network.num_classes:
        parts.append(f"the classifier ({classes} classes there, {network.num_classes} here) starts anew")
    elif objective.num_views == 1 and len(takers) > 1:
        parts.append(f"the classifier in peer {first + 1} alone, as peers that are equal would stay equal")
    return "; ".join([*parts, *_others(network, takers)])


def logits_layer(classifier: fx.GraphModule) -> tuple[str, ...]:
    """The names of the tensors of a classifier's last linear layer."""
    called = [str(node.target) for node in classifier.graph.nodes if node.op == "call_module"]
    last = [name for name in called if isinstance(classifier.get_submodule(name), nn.Linear)][-1]
    return tuple(f"{last}.{name}" for name in classifier.get_submodule(last).state_dict())


def _first(objective: Objective, takers: Sequence[int]) -> int:
    """The peer that takes everything: the deployed one, if it takes anything."""
    return objective.deployment.peer if objective.deployment.peer in takers else takers[0]


def _classes(network: PeerNetwork, given: RunNetwork, peer: int) -> int:
    """Of how many classes the given network is; as many as ours, if it does not say."""
    classifier = network.classifiers[peer]
    assert isinstance(classifier, fx.GraphModule)
    held = [given.tensors[name] for name in logits_layer(classifier) if name in given.tensors]
    return len(held[0]) if held and held[0].dim() else network.num_classes


def _refuse_strangers(network: PeerNetwork, given: RunNetwork) -> None:
    strange = [name for name in given.tensors if name not in network.deployed_state_dict()]
    if strange:
        shape = _sized(given.tensors[strange[0]].shape)
        raise ConfigError(
            f"--init {given.path}: no such {given.model}: '{strange[0]}', {shape}, is not in it; "
            "give a run of the same --model"
        )


@torch.no_grad()
def _take(part: nn.Module, given: RunNetwork, anew: Sequence[str]) -> set[str]:
    """Fill a part but for the tensors in `anew`, and return the names of what was filled."""
    own = {name: tensor for name, tensor in part.state_dict().items() if name not in anew}
    for name, tensor in own.items():
        found = given.tensors.get(name)
        if found is None or found.shape != tensor.shape:
            says = "is missing" if found is None else f"is {_sized(found.shape)}, here {_sized(tensor.shape)}"
            raise ConfigError(
                f"--init {given.path}: no such {given.model}: '{name}' {says}; give a run of the same --model"
            )
    for name, tensor in own.items():
        tensor.copy_(given.tensors[name])
    return set(own)


def _sized(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "a number"


def _others(network: PeerNetwork, takers: Sequence[int]) -> list[str]:
    """What begins at random, as it is of another backbone."""
    said = [] if 0 in takers else [f"the trunk ({network.backbones[0].name}) starts anew"]
    for j, backbone in enumerate(network.backbones):
        if j not in takers:
            said.append(f"peer {j + 1} ({backbone.name}) starts anew")
    return said
