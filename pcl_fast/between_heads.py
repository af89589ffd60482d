"""What two heads say of the same images: how often they agree, and how far their predictions are apart."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

DIGITS = 5  # of a figure that is written down


@dataclass(frozen=True, slots=True)
class BetweenHeads:
    """Every pair of heads, over all images; [H][H], row i and column j for p_i and p_j at temperature 1.

    `agreement`: share of images with the same top-1. `kl`: mean KL(p_i || p_j) in nats. `distance`: mean
    Euclidean distance ||p_i - p_j||_2 of the softmax outputs.
    """

    heads: tuple[str, ...]
    agreement: list[list[float]]
    kl: list[list[float]]
    distance: list[list[float]]

    def as_dict(self) -> dict[str, Any]:
        """Plain values of five significant digits, ready for JSON."""
        measures = {"agreement": self.agreement, "kl": self.kl, "distance": self.distance}
        rounded = {
            name: [[float(f"{value:.{DIGITS}g}") for value in row] for row in matrix]
            for name, matrix in measures.items()
        }
        return {"heads": list(self.heads)} | rounded


def pair_sums(log_probabilities_HBC: Tensor, answers_HB: Tensor) -> Tensor:
    """Agreements, KL and distances of all pairs of heads, summed over a batch: float64 [3, H, H].

    Products of all heads' predictions with each other, an image at a time. In float64, because what is
    small is a difference of what is not.
    """
    logs_BHC = log_probabilities_HBC.double().transpose(0, 1)
    shares_BHC = logs_BHC.exp()
    cross_BHH = shares_BHC @ logs_BHC.mT  # sum_c p_i log p_j
    gram_BHH = shares_BHC @ shares_BHC.mT
    kl_BHH = _diagonal(cross_BHH)[:, :, None] - cross_BHH
    norms_BH = _diagonal(gram_BHH)
    squares_BHH = norms_BH[:, :, None] + norms_BH[:, None, :] - 2 * gram_BHH
    agreement_HHB = answers_HB[:, None] == answers_HB[None, :]
    distance_HH = squares_BHH.clamp(min=0).sqrt().sum(0)
    return torch.stack([agreement_HHB.double().sum(-1), kl_BHH.clamp(min=0).sum(0), distance_HH])


def between_heads(
    heads: Sequence[str], sums: Sequence[Sequence[Sequence[float]]], images: int
) -> BetweenHeads:
    """The means over all images, from sums [3][H][H] of batches and ranks."""
    agreement, kl, distance = ([[value / images for value in row] for row in matrix] for matrix in sums)
    return BetweenHeads(tuple(heads), agreement, kl, distance)


def _diagonal(matrices_BHH: Tensor) -> Tensor:
    return matrices_BHH.diagonal(dim1=-2, dim2=-1)
