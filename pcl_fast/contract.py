"""What the parts of the trainer hand to each other.

Shape letters, used in names throughout: V views (or peers), B batch, C classes (image channels in
`BCHW`), F features, H and W pixels.
"""

import contextlib
from abc import abstractmethod
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar, runtime_checkable

from torch import Tensor, nn

from pcl_fast.errors import ConfigError

Batch = TypeVar("Batch")


@dataclass(frozen=True, slots=True)
class ViewBatch:
    """One training batch: every sample augmented once per view, on the training device.

    `views_VBCHW` is normalised, float32 (or bfloat16 where that is what convolutions compute in); each
    view may be channels-last in memory. `labels_B` is int64; once a step has mixed images or softened
    labels, floats [B, C]. `sample_ids_B` is int64, the samples' places in the data set.
    """

    views_VBCHW: Tensor
    labels_B: Tensor
    sample_ids_B: Tensor


@dataclass(frozen=True, slots=True)
class EvalBatch:
    """One evaluation batch: un-augmented, normalised images on the training device, of a view's type."""

    images_BCHW: Tensor
    labels_B: Tensor


@dataclass(frozen=True, slots=True)
class PeerOutputs:
    """What a multi-branch network says of a batch; `ensemble_logits_BC` is None without that classifier.

    `logits_VBC` are z_j of method and code, V being the m peers, and `features` their h_j, each [B, F].
    `targets_KBC` are logits that a head makes for K of the peers to learn from.
    """

    logits_VBC: Tensor
    features: Sequence[Tensor]
    ensemble_logits_BC: Tensor | None
    targets_KBC: Tensor | None = None


@dataclass(frozen=True, slots=True)
class PeerParts:
    """What a forward pass has made of a batch.

    `trunk_map_BCHW` is the trunk's output for the first view. The rest is by peer: `maps` [B, C, H, W], the
    last ones before they are pooled, for heads that want them; `features` [B, F]; `logits` [B, C].
    """

    trunk_map_BCHW: Tensor
    maps: Sequence[Tensor]
    features: Sequence[Tensor]
    logits: Sequence[Tensor]


@dataclass(frozen=True, slots=True)
class HeadOutputs:
    """What a head says: `logits_BC` of all peers together; `targets_KBC`, what some peers are taught by."""

    logits_BC: Tensor
    targets_KBC: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadShapes:
    """What a head must know of the network it is for; one thing for each peer, which may be other backbones.

    `feature_dims` are the widths of their features. `trunk_channels` are those of the trunk's output, 0 if it
    is no map; `map_shapes`, channels, height and width of their last maps, none if a peer makes none.
    """

    num_peers: int
    num_classes: int
    feature_dims: tuple[int, ...]
    trunk_channels: int
    map_shapes: tuple[tuple[int, ...], ...] = ()

    @property
    def feature_dim(self) -> int:
        """The width of every peer's features, for a head that wants one. ConfigError if they differ."""
        if len(set(self.feature_dims)) > 1:
            widths = ", ".join(map(str, self.feature_dims))
            raise ConfigError(
                f"--model: the peers' features are {widths} wide, and what this method puts over them takes "
                "one width; give backbones that have it"
            )
        return self.feature_dims[0]


class PeerHead(nn.Module):
    """A module over all peers. It learns with the network; unless it `wants_maps`, it gets none."""

    wants_maps: bool = False

    @abstractmethod
    def forward(self, parts: PeerParts) -> HeadOutputs:
        """Look at all peers."""


MakeHead = Callable[[HeadShapes], PeerHead]


class TrainLoader(Protocol):
    """An endless source of epochs; what an epoch holds depends on (seed, epoch) alone.

    Of several ranks each has a loader, which serves its share of every global batch: the same samples a
    step for any number of ranks whose batches add up to the same. All ranks have as many batches, and a
    batch has a sample for each.
    """

    @property
    def num_samples(self) -> int:
        """Samples in the data set, those of all ranks."""
        ...

    @property
    def steps_per_epoch(self) -> int:
        """Batches an epoch, the same for every rank."""
        ...

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[ViewBatch]:
        """Yield the batches of an epoch (0-based) from batch `first_step` on.

        Batches may be kept: nothing is written to them later. What the iterator holds (threads,
        processes) ends when it is exhausted, closed or dropped, and what goes wrong there is raised here.
        """
        ...


@runtime_checkable
class DeviceLoader(TrainLoader, Protocol):
    """A loader that makes its batches on the device alone, so that a CUDA graph can hold their making."""

    @property
    def batch_size(self) -> int:
        """Images in a batch, of this rank."""
        ...

    @property
    def is_even(self) -> bool:
        """Whether every batch has `batch_size` images, of one size; `begin` and `take` serve only such."""
        ...

    def begin(self, epoch: int, first_step: int = 0) -> None:
        """Lay an epoch (0-based) out on the device, in the same memory every time, at batch `first_step`."""
        ...

    def take(self) -> ViewBatch:
        """The next batch of the epoch by device operations only: that of `epoch()`, perhaps in bfloat16."""
        ...


class EvalLoader(Protocol):
    """A finite source of evaluation batches in which every sample occurs exactly once.

    Of several ranks each has a loader, and every sample occurs for exactly one of them. Numbers of batches
    may differ, and a rank has none where there are fewer samples than ranks.
    """

    @property
    def num_samples(self) -> int:
        """Samples in the data set, those of all ranks."""
        ...

    def __iter__(self) -> Iterator[EvalBatch]:
        """Yield every batch of this rank once."""
        ...


@dataclass(frozen=True, slots=True)
class OpenData:
    """A data set opened for a run; `held_out` are training images that are never trained on, if any are."""

    train: TrainLoader
    val: EvalLoader
    held_out: EvalLoader | None = None

    def close(self) -> None:
        """Close the loaders that can be closed."""
        for loader in (self.train, self.val, self.held_out):
            close_if_possible(loader)


@contextlib.contextmanager
def ended(batches: Iterator[Batch]) -> Generator[Iterator[Batch]]:
    """A loader's iterator within a block; threads and processes that it holds end with the block."""
    try:
        yield batches
    finally:
        close_if_possible(batches)


def close_if_possible(holder: object) -> None:
    """Call `close()` of what has one."""
    close = getattr(holder, "close", None)
    if close is not None:
        close()
