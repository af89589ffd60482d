"""The multi-branch network of PCL: one trunk, m peers, and an ensemble classifier over their features."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, fx, nn

from pcl_fast.config import MAX_PEERS
from pcl_fast.contract import HeadOutputs, MakeHead, PeerHead, PeerOutputs, PeerParts
from pcl_fast.errors import ConfigError
from pcl_fast.models.branches import cut_peers, head_shapes, keys_of, trunk_map
from pcl_fast.models.fuse import attach_convolutions, chain_blocks, fuse_norms, note_calls
from pcl_fast.models.last_map import expose_map
from pcl_fast.models.split import SplitNetwork
from pcl_fast.models.view_norm import ViewBatchNorm2d, allow_kernels, convert_batch_norm, set_num_views
from pcl_fast.models.zoo import Backbone
from pcl_fast.streams import Fork

Result = TypeVar("Result")


class PeerNetwork(nn.Module):
    """m peers that share their low-level layers (method: Wu and Gong, arXiv 2006.04147, section 3).

    The peers start from independent random weights; the trunk is the first one's. They are of one backbone,
    or each of its own. Peer j has `branches[j]` and `classifiers[j]`, whose layers keep their names in the
    plain backbone. `ensemble` is one linear layer over the concatenated features [h_1; ...; h_m], another
    head over all peers, or None.

    `bn_views="per_view"`: the trunk's BatchNorm normalises each view by its own statistics and updates
    its running statistics once a view, in order; "joint": once, over all views. `trunk_views="batched"`
    runs the views as one batch, "loop" one after the other with ordinary BatchNorm: the reference. Which is
    faster depends on device and batch; the batch makes a third as many, larger calls with three views.
    `fork`, if set, runs the peers side by side. What peers send back into the trunk is multiplied with
    `split_gradient`.
    Raises ConfigError for a number of peers outside 1 to 8, and for backbones that cannot be split or joined.
    """

    def __init__(
        self,
        backbone: Backbone | Sequence[Backbone],
        num_classes: int,
        num_peers: int = 3,
        *,
        ensemble: bool | MakeHead = True,
        bn_views: Literal["per_view", "joint"] = "per_view",
        trunk_views: Literal["batched", "loop"] = "batched",
    ) -> None:
        super().__init__()
        if not 1 <= num_peers <= MAX_PEERS:
            raise ConfigError(f"num_peers is {num_peers}; it must be from 1 to {MAX_PEERS}.")
        if bn_views == "joint" and trunk_views == "loop":
            raise ConfigError(
                "trunk_views 'loop' sees one view at a time; with bn_views 'joint' use 'batched'."
            )
        alike = isinstance(backbone, Backbone)
        self.backbones = (backbone,) * num_peers if alike else tuple(backbone)
        assert len(self.backbones) == num_peers, "one backbone for all peers, or one for each"
        peers = cut_peers(self.backbones, num_classes)
        self.num_classes, self.num_peers = num_classes, num_peers
        self.feature_dims = tuple(peer.feature_dim for peer in peers)
        self._keys = [keys_of(peer, peers[0].trunk) for peer in peers]
        self.trunk = peers[0].trunk
        self.branches = nn.ModuleList(peer.body for peer in peers)
        self.classifiers = nn.ModuleList(peer.classifier for peer in peers)
        self.ensemble = self._make_head(ensemble, peers[0]) if callable(ensemble) else None
        if ensemble is True:
            self.ensemble = nn.Linear(sum(self.feature_dims), num_classes)
        self.trunk_views = trunk_views
        self.fork: Fork | None = None
        self.split_gradient = 1.0
        self._counts: Tensor | None = None
        self._counts_a_step: tuple[Tensor, ...] = ()
        self._rewrite(bn_views)

    def _make_head(self, make: MakeHead, first: SplitNetwork) -> PeerHead:
        """A head of its own kind, with the peers' last maps if it wants them."""
        map_BCHW = trunk_map(first, self.backbones[0].image_size)
        shapes, nodes = head_shapes(self._branches(), self.feature_dims, self.num_classes, map_BCHW)
        head = make(shapes)
        if head.wants_maps:
            for branch, node in zip(self._branches(), nodes, strict=True):
                expose_map(branch, node)
        convert_batch_norm(head)
        return head

    def _rewrite(self, bn_views: str) -> None:
        """Put our layers in the place of torch's."""
        converted = [convert_batch_norm(part) for part in self._parts()]
        if bn_views == "per_view" and self.trunk_views == "batched" and not converted[0]:
            name = self.backbones[0].name
            warnings.warn(f"{name}: a layer of the trunk mixes views; it runs view by view.", stacklevel=3)
            self.trunk_views = "loop"
        self._views_apart = bn_views == "per_view" and self.trunk_views == "batched"
        self._views_set = 1
        for part in self._parts():
            note_calls(part)
            fuse_norms(part)

    def count_together(self) -> None:
        """From now on, count the batches that all norms have seen by one addition a step.

        Their counts become views of one tensor; moving the network to another device takes them apart.
        """
        norms = [layer for layer in self.modules() if isinstance(layer, ViewBatchNorm2d)]
        if not norms:
            return
        each = [norm.num_batches_tracked for norm in norms]
        counts = self._counts = torch.stack([count for count in each if count is not None])
        for norm, count in zip(norms, counts.unbind(), strict=True):
            norm.num_batches_tracked, norm.counts = count, False
        in_trunk = set(self.trunk.modules())
        # A norm of the trunk sees each view, unless all of them are one batch to it; others see their peer's.
        apart = self._views_apart or self.trunk_views == "loop"
        self._counts_a_step = tuple(
            counts.new_tensor([norm.calls * (views if apart and norm in in_trunk else 1) for norm in norms])
            for views in range(1, self.num_peers + 1)
        )

    def use_kernels(self, device: torch.device) -> None:
        """From now on, let kernels of ours compute what they know, in training.

        Norms with what follows them; on the CPU also the convolutions before them, and whole residual blocks.
        """
        for part in self._parts():
            allow_kernels(part)
            if device.type == "cpu":
                attach_convolutions(part)
                chain_blocks(part)

    def _parts(self) -> list[fx.GraphModule]:
        return [self.trunk, *self._branches()]

    def _branches(self) -> list[fx.GraphModule]:
        return list(self.branches)  # pyright: ignore[reportReturnType]

    def forward(self, views_VBCHW: Tensor) -> PeerOutputs:
        """Run every peer on its view (V = num_peers) or all on the same one (V = 1)."""
        num_views = views_VBCHW.shape[0]
        if num_views not in (1, self.num_peers):
            raise ConfigError(
                f"{num_views} views for {self.num_peers} peers; give one a peer, or one for all."
            )
        maps = self.run_trunk(views_VBCHW)
        if self.split_gradient != 1.0:
            maps = [scale_gradient(view_map, self.split_gradient) for view_map in maps]
        if num_views < self.num_peers:
            maps = maps * self.num_peers
        peers = [partial(self._run_peer, j, view_map) for j, view_map in enumerate(maps)]
        features, logits, maps_before = zip(*self._side_by_side(peers), strict=True)
        if self.training and self._counts is not None:
            self._counts.add_(self._counts_a_step[num_views - 1])
        said = self._ask_ensemble(PeerParts(maps[0], maps_before, features, logits))
        together = (None, None) if said is None else (said.logits_BC, said.targets_KBC)
        return PeerOutputs(torch.stack(logits), features, *together)

    def _ask_ensemble(self, parts: PeerParts) -> HeadOutputs | None:
        if self.ensemble is None:
            return None
        if isinstance(self.ensemble, PeerHead):
            return self.ensemble(parts)
        return HeadOutputs(self.ensemble(torch.cat(tuple(parts.features), dim=1)))  # z_t = A [h_1; ...; h_m]

    def _run_peer(self, j: int, view_map: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        made = self.branches[j](view_map)
        feature, last = made if isinstance(made, tuple) else (made, None)
        return feature, self.classifiers[j](feature), last

    def _side_by_side(self, tasks: list[Callable[[], Result]]) -> list[Result]:
        return [task() for task in tasks] if self.fork is None else self.fork(tasks)

    def run_trunk(self, views_VBCHW: Tensor) -> list[Tensor]:
        """The trunk's output for each view."""
        if self.trunk_views == "loop":
            return [self.trunk(view) for view in views_VBCHW]
        num_views, batch = views_VBCHW.shape[:2]
        if self._views_apart and self.trunk.training and num_views != self._views_set:
            set_num_views(self.trunk, num_views)
            self._views_set = num_views
        # split, not unbind: its backward is a concatenation that keeps channels-last.
        return list(self.trunk(views_VBCHW.flatten(0, 1)).split(batch))

    def load_deployed(self, tensors: Mapping[str, Tensor], peer: int = 0) -> None:
        """The inverse of `deployed_state_dict`. KeyError or RuntimeError if they are of another network."""
        for part in (self.trunk, self.branches[peer], self.classifiers[peer]):
            part.load_state_dict({key: tensors[key] for key in part.state_dict()})

    def deployed_state_dict(self, peer: int = 0) -> dict[str, Tensor]:
        """Trunk, branch and classifier of a peer under the names of the plain backbone.

        The trunk has the names of the first peer's, if the peer's own backbone has another.
        """
        parts = (self.trunk, self.branches[peer], self.classifiers[peer])
        entries = {key: value for part in parts for key, value in part.state_dict().items()}
        return {key: entries[key] for key in self._keys[peer]}


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """The same values, with a gradient `factor` times as large."""
    return _ScaledGradient.apply(x, factor)  # pyright: ignore[reportReturnType]


class _ScaledGradient(torch.autograd.Function):
    """The identity, but for its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore
        return grad * ctx.factor, None
