"""What is measured: running means over training steps, and the accuracy of every head of a network."""

import time
from collections.abc import Callable
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
        self._sums = torch.zeros(width, dtype=torch.float64, device=device)
        self.reset()

    def add(self, sums: Tensor, samples: int) -> None:
        """Add a step's values [width], each a sum over `samples`."""
        self._sums += sums
        self._samples += samples
        self._samples_here += samples

    def means(self) -> list[float]:
        """The mean over samples of each value. Waits for the device."""
        return (self._sums / max(self._samples, 1)).tolist()

    def rate(self) -> float:
        """Samples a second since the last reset (or resume)."""
        return self._samples_here / (time.perf_counter() - self._began)

    def reset(self) -> None:
        """Start anew."""
        self._sums.zero_()
        self._samples = 0
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave what came before out of the rate."""
        self._samples_here = 0
        self._began = time.perf_counter()

    def state_dict(self) -> dict[str, Any]:
        """Sums and count."""
        return {"sums": self._sums.cpu().clone(), "samples": self._samples}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from saved sums."""
        self.reset()
        self._sums.copy_(state["sums"])
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


@torch.no_grad()
def measure_heads(
    predict: Predict,
    loader: EvalLoader,
    names: tuple[str, str],
    each_batch: Callable[[], None] = lambda: None,
) -> dict[str, Accuracy]:
    """Accuracy of every head of one network over a data set.

    `predict` maps images as one shared view [1,B,C,H,W] to outputs. `names` are the prefix of a peer's
    head and the name of the ensemble's: `("peer", "ensemble")` gives peer1, ..., ensemble.
    `each_batch` is called before every batch and may raise to stop.
    """
    sums: Tensor | None = None
    images = 0
    has_ensemble = False
    with ended(iter(loader)) as batches:
        for batch in batches:
            each_batch()
            outputs = predict(batch.images_BCHW[None])
            heads_HBC = outputs.logits_VBC
            has_ensemble = outputs.ensemble_logits_BC is not None
            if outputs.ensemble_logits_BC is not None:
                heads_HBC = torch.cat([heads_HBC, outputs.ensemble_logits_BC[None]])
            scores = _scores(heads_HBC.float(), batch.labels_B)
            sums = scores if sums is None else sums + scores
            images += len(batch.labels_B)
    assert sums is not None, "an evaluation loader yields at least one batch"
    peers = len(sums) - has_ensemble
    heads = [f"{names[0]}{j + 1}" for j in range(peers)] + [names[1]] * has_ensemble
    rows: list[list[float]] = sums.tolist()
    return {
        head: Accuracy(100 * top1 / images, 100 * top5 / images, loss / images, images)
        for head, (top1, top5, loss) in zip(heads, rows, strict=True)
    }


def _scores(heads_HBC: Tensor, labels_B: Tensor) -> Tensor:
    """Sums over the batch of top-1 hits, top-5 hits and cross-entropy, for each head: float64 [H, 3]."""
    best_HB5 = heads_HBC.topk(min(5, heads_HBC.shape[-1]), dim=-1).indices
    hits_HB5 = best_HB5 == labels_B[:, None]
    losses = F.cross_entropy(heads_HBC.flatten(0, 1), labels_B.repeat(len(heads_HBC)), reduction="none")
    columns = [hits_HB5[..., 0].sum(-1), hits_HB5.any(-1).sum(-1), losses.view(len(heads_HBC), -1).sum(-1)]
    return torch.stack([column.double() for column in columns], dim=-1)
