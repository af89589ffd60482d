"""What a backbone cut in two has to do as peers that share the trunk: operations, FLOPs, parameters."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.fx.proxy import TraceError
from torch.utils.flop_counter import FlopCounterMode

from pcl_fast.contract import MakeHead, PeerHead, PeerParts
from pcl_fast.models.branches import cut_peers, head_shapes
from pcl_fast.models.operations import Operation, operations_of
from pcl_fast.models.split import SplitNetwork
from pcl_fast.models.zoo import Backbone


@dataclass(frozen=True, slots=True, kw_only=True)
class BranchOperations:
    """What a peer has for itself, its classifier included."""

    operations: tuple[Operation, ...]
    parameters: int
    feature_dim: int


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkOperations:
    """A backbone cut in two: what m peers share, and what each has for itself, its classifier included.

    `each` are the branches of all peers, where they are not all like the one given. `head` is what looks at
    all of so many peers, if it is not a linear classifier over their features; `trained_teacher`, another
    network that only tells what it sees on the first view.
    """

    trunk: tuple[Operation, ...]
    branch: tuple[Operation, ...]
    trunk_parameters: int
    branch_parameters: int
    feature_dim: int
    num_classes: int
    each: tuple[BranchOperations, ...] = ()
    head: tuple[Operation, ...] | None = None
    trained_teacher: tuple[Operation, ...] = ()

    @property
    def forward_flops(self) -> int:
        """Of the plain network, one image."""
        return sum(operation.flops for operation in (*self.trunk, *self.branch))

    @property
    def parameters(self) -> int:
        """Of the plain network."""
        return self.trunk_parameters + self.branch_parameters

    def peer_parameters(self, num_peers: int, ensemble: bool) -> int:
        """Of m peers that share the trunk, and of what looks at all of them."""
        over_all = sum(each.parameters for each in self.ensemble(num_peers)) if ensemble else 0
        branches = sum(branch.parameters for branch in self._branches(num_peers))
        return self.trunk_parameters + branches + over_all

    def of_peers(self, num_peers: int) -> list[tuple[Operation, int]]:
        """Every operation of the peers' branches, and how many of them do it."""
        if not self.each:
            return [(operation, num_peers) for operation in self.branch]
        return [(operation, 1) for branch in self.each for operation in branch.operations]

    def _branches(self, num_peers: int) -> tuple[BranchOperations, ...]:
        own = BranchOperations(
            operations=self.branch, parameters=self.branch_parameters, feature_dim=self.feature_dim
        )
        return self.each or (own,) * num_peers

    def deploying(self, peer: int) -> "NetworkOperations":
        """The same, with this peer's (0-based) as the plain network."""
        if not self.each:
            return self
        own = self.each[peer]
        return replace(
            self, branch=own.operations, branch_parameters=own.parameters, feature_dim=own.feature_dim
        )

    def step_flops(self, num_views: int, num_peers: int, ensemble: bool, teacher: bool) -> int:
        """Of a training step, an image's share: forward, backward, and the teachers' forward."""
        parts = [(operation, num_views) for operation in self.trunk]
        parts += self.of_peers(num_peers)
        total = sum(times * ((1 + teacher) * each.flops + each.backward_flops) for each, times in parts)
        over_all = self.ensemble(num_peers) if ensemble else ()
        told = sum(each.flops for each in self.trained_teacher)
        return total + told + sum(each.flops + each.backward_flops for each in over_all)

    def ensemble(self, num_peers: int) -> tuple[Operation, ...]:
        """What looks at all peers: the head, or the classifier over the features of all."""
        if self.head is not None:
            return self.head
        features = sum(branch.feature_dim for branch in self._branches(num_peers))
        weights, classes = features * self.num_classes, self.num_classes
        linear = Operation(
            kind="product", flops=2 * weights, read=features, written=classes, parameters=weights + classes
        )
        return (linear,)


def network_operations(
    backbone: Backbone | Sequence[Backbone],
    num_classes: int,
    image_size: int,
    num_peers: int = 1,
    make_head: MakeHead | None = None,
    trained_teacher: Backbone | None = None,
) -> NetworkOperations:
    """Build a backbone, or one for each peer, on the CPU and run one square image through it, in eval mode.

    Likewise a head of its own over so many peers, and a trained teacher, if there are any.
    Raises ConfigError for backbones that cannot be split or joined. Torch's random state is left as it was.
    """
    image = torch.zeros(1, 3, image_size, image_size)
    one = isinstance(backbone, Backbone)
    with torch.random.fork_rng(devices=[]):
        splits = cut_peers((backbone,) if one else backbone, num_classes)
        shared = splits[0].trunk
        trunk, middle = operations_of(shared, image, needs_gradient=False)
        branches = [_branch(split, middle, needs_gradient=_count(shared) > 0) for split in splits]
        peers = splits * num_peers if one else splits
        over_all = None if make_head is None else _head(make_head, peers, middle, num_classes)
        told = () if trained_teacher is None else _whole(trained_teacher, num_classes, image)
    return NetworkOperations(
        trunk=trunk,
        branch=branches[0].operations,
        trunk_parameters=_count(shared),
        branch_parameters=branches[0].parameters,
        feature_dim=branches[0].feature_dim,
        num_classes=num_classes,
        each=() if one else tuple(branches),
        head=over_all,
        trained_teacher=told,
    )


def _branch(split: SplitNetwork, trunk_map: Tensor, needs_gradient: bool) -> BranchOperations:
    body, features = operations_of(split.body, trunk_map, needs_gradient=needs_gradient)
    classifier, _ = operations_of(split.classifier, features)
    return BranchOperations(
        operations=(*body, *classifier),
        parameters=_count(split.body) + _count(split.classifier),
        feature_dim=split.feature_dim,
    )


def _whole(backbone: Backbone, num_classes: int, image: Tensor) -> tuple[Operation, ...]:
    return operations_of(backbone.build(num_classes), image, needs_gradient=False)[0]


def _head(
    make: MakeHead, peers: Sequence[SplitNetwork], trunk_map: Tensor, num_classes: int
) -> tuple[Operation, ...]:
    """A head's operations over so many peers, given the trunk's output for an image."""
    widths = [peer.feature_dim for peer in peers]
    shapes, _ = head_shapes([peer.body for peer in peers], widths, num_classes, trunk_map)
    head = make(shapes)
    maps = shapes.map_shapes if head.wants_maps else ()
    seen = [*maps, *((width,) for width in widths), *((num_classes,) for _ in peers)]
    opened = _OpenedHead(head, [trunk_map.shape[1:], *seen])
    x = torch.zeros(1, sum(opened.sizes))
    try:
        return operations_of(opened, x)[0]
    except (TypeError, RuntimeError, TraceError):  # fx cannot follow everything that Python can do
        return (_as_one(opened, x),)


def _as_one(part: nn.Module, x: Tensor) -> Operation:
    """A module that fx cannot open: all that it does, done by one kernel."""
    with torch.enable_grad(), FlopCounterMode(display=False) as counter:
        out = part.eval()(x)
    flops = counter.get_total_flops()
    return Operation(
        kind="product", flops=flops, read=x.numel(), written=out.numel(), parameters=_count(part)
    )


class _OpenedHead(nn.Module):
    """A head over one tensor that holds all that it looks at, side by side, so that its graph has one input.

    `shapes` are those for an image: of the trunk's output; of each peer's last map, if the head wants them;
    of each peer's features; of each one's logits.
    """

    def __init__(self, head: PeerHead, shapes: Sequence[Sequence[int]]) -> None:
        super().__init__()
        self.head, self.shapes = head, shapes
        self.sizes = [math.prod(shape) for shape in shapes]

    def forward(self, x: Tensor) -> Tensor:
        """Views of `x`, which cost nothing, and what the head says of them."""
        held = torch.split(x, self.sizes, dim=1)
        trunk_map, *rest = [held[index].view(1, *shape) for index, shape in enumerate(self.shapes)]
        m = len(rest) // (2 + self.head.wants_maps)
        maps, features, logits = rest[: -2 * m], rest[-2 * m : -m], rest[-m:]
        # its forward, as a head without layers of its own would not be opened
        return self.head.forward(PeerParts(trunk_map, maps, features, logits)).logits_BC


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
