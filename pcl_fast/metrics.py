"""What is measured: running means over training steps, and the accuracy of every head of a network."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pcl_fast.between_heads import BetweenHeads, between_heads, pair_sums
from pcl_fast.calibration import calibration_error, calibration_gaps
from pcl_fast.contract import EvalLoader, PeerOutputs, ended
from pcl_fast.dist import ALONE, World


class RunningMeans:
    """Sums of per-step tensors on the device, read by the host only when a mean is asked for.

    Sums are float64 and saved with a checkpoint, so that a mean does not depend on where a run was
    interrupted and resumed. Each rank of `world` has its own; a mean is that over the samples of all.
    """

    def __init__(self, width: int, device: torch.device, world: World = ALONE) -> None:
        self.sums = torch.zeros(width, dtype=torch.float64, device=device)
        self._world = world
        self.reset()

    def count(self, samples: int) -> None:
        """Count a step's samples: the host's part."""
        self._samples += samples
        self._samples_here += samples

    def means(self) -> list[float]:
        """The mean over all ranks' samples of each value. Waits for the device."""
        both = torch.cat([self.sums, self.sums.new_tensor([self._samples])])
        self._world.sum_(both)
        return (both[:-1] / both[-1].clamp(min=1)).tolist()

    def rate(self) -> float:
        """Samples a second since the last reset (or resume), on all ranks if each is like this one."""
        return self._samples_here * self._world.size / (time.perf_counter() - self._began)

    def reset(self) -> None:
        """Start anew."""
        self.sums.zero_()
        self._samples = 0
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave what came before out of the rate."""
        self._samples_here = 0
        self._began = time.perf_counter()

    def state_dict(self) -> dict[str, Any]:
        """This rank's sums and count."""
        return {"sums": self.sums.cpu().clone(), "samples": self._samples}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from saved sums."""
        self.reset()
        self.sums.copy_(state["sums"])
        self._samples = state["samples"]

    def load_all(self, states: Sequence[dict[str, Any]]) -> None:
        """Go on from what all ranks had saved: each from its own, or the first for all if they are others."""
        if len(states) == self._world.size:
            self.load_state_dict(states[self._world.rank])
            return
        self.reset()
        if self._world.is_first:
            for state in states:
                self.sums += state["sums"].to(self.sums)
                self._samples += state["samples"]


@dataclass(frozen=True, slots=True)
class Accuracy:
    """A head on a whole data set: top-1 and top-5 accuracy in percent, mean cross-entropy, images.

    `ece` is the expected calibration error of its top-1 answers, in percent.
    """

    top1: float
    top5: float
    loss: float
    ece: float
    images: int

    def as_dict(self) -> dict[str, float]:
        """Plain values, ready for JSON."""
        return asdict(self)


Predict = Callable[[Tensor], PeerOutputs]
HeadNames = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Tally:
    """What one rank has counted: its images, sums for each head, and sums for each pair of them.

    `sums`: top-1 hits, top-5 hits, cross-entropy, then the gaps of calibration; `pairs` [3][H][H], in the
    order of `sums`. Both are empty without images.
    """

    images: int
    sums: dict[str, list[float]]
    pairs: list[list[list[float]]]


@torch.no_grad()
def tally_heads(
    networks: Mapping[HeadNames, Predict], loader: EvalLoader, each_batch: Callable[[], None] = lambda: None
) -> Tally:
    """Count what every head of some networks gets right of a rank's part of a data set, in one pass.

    Each network maps images as one shared view [1,B,C,H,W] to outputs. Its names are the prefix of a
    peer's head and the name of the ensemble's: `("peer", "ensemble")` gives peer1, ..., ensemble.
    `each_batch` is called before every batch and may raise to stop.
    """
    names: list[str] = []
    sums: list[Tensor] = []
    images = 0
    with ended(iter(loader)) as batches:
        for batch in batches:
            each_batch()
            view_1BCHW = batch.images_BCHW[None]
            heads = [head for own, predict in networks.items() for head in _named(own, predict(view_1BCHW))]
            names = [name for name, _ in heads]
            counted = _count(torch.stack([logits_BC for _, logits_BC in heads]).float(), batch.labels_B)
            sums = [one + other for one, other in zip(sums, counted, strict=True)] if sums else [*counted]
            images += len(batch.labels_B)
    rows: list[list[float]] = sums[0].tolist() if sums else []
    return Tally(images, dict(zip(names, rows, strict=True)), sums[1].tolist() if sums else [])


def accuracies(tallies: Sequence[Tally]) -> dict[str, Accuracy]:
    """The accuracy of every head, from what all ranks have counted; counts are exact however they shared."""
    images, totals = _totals(tallies)
    return {
        head: Accuracy(
            100 * top1 / images, 100 * top5 / images, loss / images, calibration_error(gaps, images), images
        )
        for head, (top1, top5, loss, *gaps) in totals.items()
    }


def compared(tallies: Sequence[Tally]) -> BetweenHeads | None:
    """How alike the heads are, from what all ranks have counted; None of one head."""
    images, totals = _totals(tallies)
    pairs = torch.tensor([tally.pairs for tally in tallies if tally.images], dtype=torch.float64).sum(0)
    return between_heads(list(totals), pairs.tolist(), images) if len(totals) > 1 else None


def _totals(tallies: Sequence[Tally]) -> tuple[int, dict[str, list[float]]]:
    """All ranks' images, and each head's sums over them."""
    counted = [tally.sums for tally in tallies if tally.images]
    assert counted, "an evaluation loader yields at least one batch"
    totals = {
        head: [sum(column, 0.0) for column in zip(*(sums[head] for sums in counted), strict=True)]
        for head in counted[0]
    }
    return sum(tally.images for tally in tallies), totals


def _named(names: HeadNames, outputs: PeerOutputs) -> list[tuple[str, Tensor]]:
    """A network's heads, logits [B, C] each, under their names."""
    heads = [(f"{names[0]}{number}", logits_BC) for number, logits_BC in enumerate(outputs.logits_VBC, 1)]
    ensemble = outputs.ensemble_logits_BC
    return heads if ensemble is None else [*heads, (names[1], ensemble)]


def _count(heads_HBC: Tensor, labels_B: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over a batch, in float64: of each head as in `Tally.sums` [H, 3 + bins], of pairs [3, H, H]."""
    best_HB5 = heads_HBC.topk(min(5, heads_HBC.shape[-1]), dim=-1).indices
    hits_HB5 = best_HB5 == labels_B[:, None]
    losses = F.cross_entropy(heads_HBC.flatten(0, 1), labels_B.repeat(len(heads_HBC)), reduction="none")
    columns = [hits_HB5[..., 0].sum(-1), hits_HB5.any(-1).sum(-1), losses.view(len(heads_HBC), -1).sum(-1)]
    logs_HBC = heads_HBC.double().log_softmax(-1)
    gaps_HN = calibration_gaps(logs_HBC.amax(-1).exp(), hits_HB5[..., 0])
    scores = torch.cat([torch.stack([column.double() for column in columns], dim=-1), gaps_HN], dim=-1)
    return scores, pair_sums(logs_HBC, best_HB5[..., 0])
