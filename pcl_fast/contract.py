"""What the parts of the trainer hand to each other.

Shape letters, used in names throughout: V views (or peers), B batch, C classes (image channels in
`BCHW`), F features, H and W pixels.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, slots=True)
class ViewBatch:
    """One training batch: every sample augmented once per view, on the training device.

    `views_VBCHW` is float32 and normalised; each view may be channels-last in memory. `labels_B`
    is int64. `sample_ids_B` is int64, the samples' places in the data set.
    """

    views_VBCHW: Tensor
    labels_B: Tensor
    sample_ids_B: Tensor


@dataclass(frozen=True, slots=True)
class EvalBatch:
    """One evaluation batch: un-augmented, normalised float32 images on the training device."""

    images_BCHW: Tensor
    labels_B: Tensor


@dataclass(frozen=True, slots=True)
class PeerOutputs:
    """What a multi-branch network says of a batch; `ensemble_logits_BC` is None without that classifier.

    `logits_VBC` are z_j and `features_VBF` are h_j of method and code, V being the m peers.
    """

    logits_VBC: Tensor
    features_VBF: Tensor
    ensemble_logits_BC: Tensor | None


class TrainLoader(Protocol):
    """An endless source of epochs; what an epoch holds depends on (seed, epoch) alone."""

    @property
    def num_samples(self) -> int:
        """Samples in the data set."""
        ...

    @property
    def steps_per_epoch(self) -> int:
        """Batches an epoch."""
        ...

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[ViewBatch]:
        """Yield the batches of an epoch (0-based) from batch `first_step` on."""
        ...


class EvalLoader(Protocol):
    """A finite source of evaluation batches in which every sample occurs exactly once."""

    @property
    def num_samples(self) -> int:
        """Samples in the data set."""
        ...

    def __iter__(self) -> Iterator[EvalBatch]:
        """Yield every batch once."""
        ...


@dataclass(frozen=True, slots=True)
class OpenData:
    """A data set opened for a run."""

    train: TrainLoader
    val: EvalLoader
