"""Softmax, KL and cross-entropy written out in numpy's float64, loop by loop."""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pcl_fast.config import PclConfig
from pcl_fast.contract import PeerOutputs
from pcl_fast.objectives.base import Objective
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
    return PeerOutputs(logits, (), ensemble)


def terms_of(options: PclConfig, z: Tensor, z_t: Tensor, q: Tensor, weight: float) -> dict[str, Tensor]:
    """PCL's loss term by term, by name; image i has label i."""
    objective = Pcl(options)
    values = objective.terms(said(z, z_t), said(q), torch.arange(z.shape[1]), weight)
    return dict(zip(objective.term_names, values, strict=True))


def of_kind(kind: str, terms: dict[str, Tensor]) -> list[float]:
    """The terms `ce`, `pe`, `pm` or `ml` of all peers, in their order."""
    return [value.item() for name, value in terms.items() if name.startswith(f"{kind}/peer")]


Terms = dict[str, Tensor]


def named_terms(objective: Objective, outputs: PeerOutputs, labels: Tensor, weight: float = 0.5) -> Terms:
    """Any method's loss term by term, by name, of a method without mean teachers."""
    values = objective.terms(outputs, None, labels, weight)
    return dict(zip(objective.term_names, values, strict=True))


def check_terms(found: Terms, expected: dict[str, float], rtol: float = 1e-10) -> None:
    """The same names in the same order, and the same values."""
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert math.isclose(found[name].item(), value, rel_tol=rtol, abs_tol=1e-12), name


def hard_terms(z: Tensor, labels: Tensor) -> dict[str, float]:
    """Cross-entropies of all peers z [V, B, C], by name."""
    return {f"ce/peer{j + 1}": cross_entropy(as_numpy(z[j]), labels.tolist()) for j in range(len(z))}


def soft_cross_entropy(target: Matrix, student: Matrix, temperature: float) -> float:
    """-sum p_target^T log p_student^T, averaged over the batch."""
    p, q, total = softened(target, temperature), softened(student, temperature), 0.0
    for image in range(len(p)):
        for label in range(p.shape[1]):
            total -= p[image, label] * math.log(q[image, label])
    return total / len(p)


def softened_gradient(target: Tensor, student: Tensor, temperature: float) -> Tensor:
    """d KL(p_target^T || p_student^T) / d student = (p_student^T - p_target^T) / (T B), target detached."""
    difference = (student / temperature).softmax(-1) - (target / temperature).softmax(-1)
    return difference.detach() / (temperature * student.shape[-2])


def hard_gradient(student: Tensor, labels: Tensor) -> Tensor:
    """d CE(student, y) / d student = (p - one-hot(y)) / B."""
    hot = torch.nn.functional.one_hot(labels, student.shape[-1])
    return (student.softmax(-1) - hot).detach() / student.shape[-2]
