"""The peers of a network, each its own backbone's branch on the trunk of the first, and what a head sees."""

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from pcl_fast.contract import HeadShapes
from pcl_fast.errors import ConfigError
from pcl_fast.models.last_map import channels, last_map, shape_of
from pcl_fast.models.split import NO_TRUNK, SplitNetwork, split_network
from pcl_fast.models.zoo import Backbone


def cut_peers(backbones: Sequence[Backbone], num_classes: int) -> list[SplitNetwork]:
    """A backbone for each peer, built with new random weights and cut; the trunk in use is the first one's.

    ConfigError for a backbone that cannot be cut, or that cannot follow the first one's trunk.
    """
    peers = [
        split_network(backbone.build(num_classes), backbone.split, backbone.features_at)
        for backbone in backbones
    ]
    first, size = backbones[0], backbones[0].image_size
    for number, (backbone, peer) in enumerate(zip(backbones, peers, strict=True), start=1):
        if backbone == first or backbone.split == NO_TRUNK:
            continue
        given, wanted = (tuple(trunk_map(each, size).shape[1:]) for each in (peers[0], peer))
        if given != wanted:
            raise ConfigError(
                f"--model: peer {number}, {backbone.name}, goes on from a trunk's {_sized(wanted)}, and that "
                f"of {first.name} makes {_sized(given)}; give --split none for whole networks"
            )
        _refuse_one_name_twice(peers[0], peer, f"peer {number}, {backbone.name}")
    return peers


def trunk_map(peer: SplitNetwork, size: int) -> Tensor:
    """What a peer's trunk makes, in eval mode, of a black square image of so many pixels."""
    was_training = peer.trunk.training
    with torch.no_grad():
        map_BCHW = peer.trunk.eval()(torch.zeros(1, 3, size, size))
    peer.trunk.train(was_training)
    return map_BCHW


def keys_of(peer: SplitNetwork, trunk: fx.GraphModule) -> tuple[str, ...]:
    """The names of a peer's tensors on this trunk, in the plain backbone's order if that is as its own.

    Otherwise those of the trunk, then of the branch, then of the classifier.
    """
    shared = tuple(trunk.state_dict())
    if shared == tuple(peer.trunk.state_dict()):
        return peer.keys
    return (*shared, *peer.body.state_dict(), *peer.classifier.state_dict())


def head_shapes(
    bodies: Sequence[fx.GraphModule], feature_dims: Sequence[int], num_classes: int, map_BCHW: Tensor
) -> tuple[HeadShapes, list[fx.Node]]:
    """What a head must know of the peers, given the trunk's output; and their last maps, if all make one."""
    nodes = [last_map(body, map_BCHW) for body in bodies]
    made = [node for node in nodes if node is not None]
    made = made if len(made) == len(nodes) else []
    shapes = HeadShapes(
        num_peers=len(bodies),
        num_classes=num_classes,
        feature_dims=tuple(feature_dims),
        trunk_channels=channels(map_BCHW.shape),
        map_shapes=tuple(tuple(shape_of(node)[1:]) for node in made),
    )
    return shapes, made


def _sized(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _refuse_one_name_twice(first: SplitNetwork, peer: SplitNetwork, who: str) -> None:
    """What is saved together must not share names: a branch's layers and those of another one's trunk."""
    names = keys_of(peer, first.trunk)
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ConfigError(
            f"--model: {who}, has a '{twice[0]}' of its own behind a trunk that has one, too; "
            "give --split none for whole networks"
        )
