"""Softmax, KL and cross-entropy written out in numpy's float64, loop by loop."""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pcl_fast.config import PclConfig
from pcl_fast.contract import PeerOutputs
from pcl_fast.objectives.pcl import Pcl

Matrix = NDArray[np.float64]


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def as_numpy(values: Tensor) -> Matrix:
    return values.detach().double().numpy()


def softened(z: Matrix, temperature: float) -> Matrix:
    """p^T = exp(z/T) / sum exp(z/T)."""
    powers = np.exp(z / temperature)
    return powers / powers.sum(1, keepdims=True)


def kl(teacher: Matrix, student: Matrix, temperature: float) -> float:
    """KL(p_teacher^T || p_student^T), summed over classes, averaged over the batch."""
    p, q, total = softened(teacher, temperature), softened(student, temperature), 0.0
    for image in range(len(p)):
        for label in range(p.shape[1]):
            total += p[image, label] * math.log(p[image, label] / q[image, label])
    return total / len(p)


def cross_entropy(z: Matrix, labels: list[int]) -> float:
    """-log p(y), averaged over the batch."""
    return -sum(math.log(row[label]) for row, label in zip(softened(z, 1.0), labels, strict=True)) / len(z)


def said(logits: Tensor, ensemble: Tensor | None = None) -> PeerOutputs:
    """Outputs with these logits; no loss of PCL reads the features."""
    return PeerOutputs(logits, torch.zeros(len(logits), 1, 1), ensemble)


def terms_of(options: PclConfig, z: Tensor, z_t: Tensor, q: Tensor, weight: float) -> dict[str, Tensor]:
    """PCL's loss term by term, by name; image i has label i."""
    objective = Pcl(options)
    values = objective.terms(said(z, z_t), said(q), torch.arange(z.shape[1]), weight)
    return dict(zip(objective.term_names, values, strict=True))


def of_kind(kind: str, terms: dict[str, Tensor]) -> list[float]:
    """The terms `ce`, `pe` or `pm` of all peers, in their order."""
    return [value.item() for name, value in terms.items() if name.startswith(f"{kind}/peer")]
