"""What a backbone cut in two has to do as peers that share the trunk: operations, FLOPs, parameters."""

from dataclasses import dataclass

import torch
from torch import nn

from pcl_fast.models.operations import Operation, operations_of
from pcl_fast.models.split import split_network
from pcl_fast.models.zoo import Backbone


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkOperations:
    """A backbone cut in two: what m peers share, and what each has for itself, its classifier included."""

    trunk: tuple[Operation, ...]
    branch: tuple[Operation, ...]
    trunk_parameters: int
    branch_parameters: int
    feature_dim: int
    num_classes: int

    @property
    def forward_flops(self) -> int:
        """Of the plain network, one image."""
        return sum(operation.flops for operation in (*self.trunk, *self.branch))

    @property
    def parameters(self) -> int:
        """Of the plain network."""
        return self.trunk_parameters + self.branch_parameters

    def peer_parameters(self, num_peers: int, ensemble: bool) -> int:
        """Of m peers that share the trunk, and of the classifier over all of them."""
        over_all = self.ensemble(num_peers).parameters if ensemble else 0
        return self.trunk_parameters + num_peers * self.branch_parameters + over_all

    def step_flops(self, num_views: int, num_peers: int, ensemble: bool, teacher: bool) -> int:
        """Of a training step, an image's share: forward, backward, and the mean teachers' forward."""
        parts = [(operation, num_views) for operation in self.trunk]
        parts += [(operation, num_peers) for operation in self.branch]
        total = sum(times * ((1 + teacher) * each.flops + each.backward_flops) for each, times in parts)
        return total + (3 * self.ensemble(num_peers).flops if ensemble else 0)

    def ensemble(self, num_peers: int) -> Operation:
        """The classifier over the features of all peers."""
        features = num_peers * self.feature_dim
        weights, classes = features * self.num_classes, self.num_classes
        return Operation(
            kind="product", flops=2 * weights, read=features, written=classes, parameters=weights + classes
        )


def network_operations(backbone: Backbone, num_classes: int, image_size: int) -> NetworkOperations:
    """Build a backbone on the CPU and run one square image of so many pixels through it, in eval mode.

    Raises ConfigError for a backbone that cannot be split. Torch's random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        split = split_network(backbone.build(num_classes), backbone.split, backbone.features_at)
    image = torch.zeros(1, 3, image_size, image_size)
    trunk, middle = operations_of(split.trunk, image, needs_gradient=False)
    body, features = operations_of(split.body, middle)
    head, _ = operations_of(split.classifier, features)
    return NetworkOperations(
        trunk=trunk,
        branch=(*body, *head),
        trunk_parameters=_count(split.trunk),
        branch_parameters=_count(split.body) + _count(split.classifier),
        feature_dim=split.feature_dim,
        num_classes=num_classes,
    )


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
