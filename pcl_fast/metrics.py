"""What is measured: running means over training steps, and the accuracy of every head of a network."""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pcl_fast.contract import EvalLoader, PeerOutputs, ended


class RunningMeans:
    """Sums of per-step tensors on the device, read by the host only when a mean is asked for.

    Sums are float64 and saved with a checkpoint, so that a mean does not depend on where a run was
    interrupted and resumed. Throughput is that of this process.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        self.sums = torch.zeros(width, dtype=torch.float64, device=device)
        self.reset()

    def count(self, samples: int) -> None:
        """Count a step's samples: the host's part."""
        self._samples += samples
        self._samples_here += samples

    def means(self) -> list[float]:
        """The mean over samples of each value. Waits for the device."""
        return (self.sums / max(self._samples, 1)).tolist()

    def rate(self) -> float:
        """Samples a second since the last reset (or resume)."""
        return self._samples_here / (time.perf_counter() - self._began)

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
        """Sums and count."""
        return {"sums": self.sums.cpu().clone(), "samples": self._samples}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from saved sums."""
        self.reset()
        self.sums.copy_(state["sums"])
        self._samples = state["samples"]


@dataclass(frozen=True, slots=True)
class Accuracy:
    """A head on a whole data set: top-1 and top-5 accuracy in percent, mean cross-entropy, images."""

    top1: float
    top5: float
    loss: float
    images: int

    def as_dict(self) -> dict[str, float]:
        """Plain values, ready for JSON."""
        return asdict(self)


Predict = Callable[[Tensor], PeerOutputs]
HeadNames = tuple[str, str]


@torch.no_grad()
def measure_heads(
    networks: Mapping[HeadNames, Predict], loader: EvalLoader, each_batch: Callable[[], None] = lambda: None
) -> dict[str, Accuracy]:
    """Accuracy of every head of some networks over a data set, in one pass.

    Each network maps images as one shared view [1,B,C,H,W] to outputs. Its names are the prefix of a
    peer's head and the name of the ensemble's: `("peer", "ensemble")` gives peer1, ..., ensemble.
    `each_batch` is called before every batch and may raise to stop.
    """
    sums: dict[str, Tensor] = {}
    images = 0
    with ended(iter(loader)) as batches:
        for batch in batches:
            each_batch()
            view_1BCHW = batch.images_BCHW[None]
            heads = [
                head for names, predict in networks.items() for head in _named(names, predict(view_1BCHW))
            ]
            scores_H3 = _scores(torch.stack([logits_BC for _, logits_BC in heads]).float(), batch.labels_B)
            for (name, _), score_3 in zip(heads, scores_H3, strict=True):
                sums[name] = sums[name] + score_3 if name in sums else score_3
            images += len(batch.labels_B)
    assert sums, "an evaluation loader yields at least one batch"
    rows: list[list[float]] = torch.stack(list(sums.values())).tolist()
    return {
        head: Accuracy(100 * top1 / images, 100 * top5 / images, loss / images, images)
        for head, (top1, top5, loss) in zip(sums, rows, strict=True)
    }


def _named(names: HeadNames, outputs: PeerOutputs) -> list[tuple[str, Tensor]]:
    """A network's heads, logits [B, C] each, under their names."""
    heads = [(f"{names[0]}{number}", logits_BC) for number, logits_BC in enumerate(outputs.logits_VBC, 1)]
    ensemble = outputs.ensemble_logits_BC
    return heads if ensemble is None else [*heads, (names[1], ensemble)]


def _scores(heads_HBC: Tensor, labels_B: Tensor) -> Tensor:
    """Sums over the batch of top-1 hits, top-5 hits and cross-entropy, for each head: float64 [H, 3]."""
    best_HB5 = heads_HBC.topk(min(5, heads_HBC.shape[-1]), dim=-1).indices
    hits_HB5 = best_HB5 == labels_B[:, None]
    losses = F.cross_entropy(heads_HBC.flatten(0, 1), labels_B.repeat(len(heads_HBC)), reduction="none")
    columns = [hits_HB5[..., 0].sum(-1), hits_HB5.any(-1).sum(-1), losses.view(len(heads_HBC), -1).sum(-1)]
    return torch.stack([column.double() for column in columns], dim=-1)
