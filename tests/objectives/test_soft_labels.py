"""Soft labels in every method: cross-entropies in numpy loops; what is distilled stays as it is."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from pcl_fast.config import ClConfig, Config, KdConfig, PclConfig
from pcl_fast.contract import PeerOutputs
from pcl_fast.objectives import METHODS, Objective, make_objective
from pcl_fast.objectives.base import count_correct
from tests.objectives.oracles import as_numpy, noise, softened

IMAGES, CLASSES = 5, 7
LABELS = torch.tensor([0, 6, 2, 2, 3])
CASES: dict[str, dict[str, Any]] = {
    **{method: {} for method in METHODS},
    "pcl, 8 peers": {"pcl": PclConfig(num_peers=8)},
    "pcl, 1 peer": {"pcl": PclConfig(num_peers=1)},
    "pcl, nothing distilled": {"pcl": PclConfig(ensemble_teacher=False, mean_teacher=False)},
    "pcl, ensemble learns": {"pcl": PclConfig(detach_ensemble=False)},
    "cl, mostly labels": {"cl": ClConfig(num_heads=8, beta=0.9)},
    "kd, much taught": {"kd": KdConfig(alpha=3.0)},
}
DISTILS_BY_LABELS = ("kdcl",)


def method_of(case: str) -> str:
    return case.split(",", maxsplit=1)[0]


def objective_of(case: str) -> Objective:
    return make_objective(Config(method=method_of(case), **CASES[case]))


def outputs_of(objective: Objective) -> tuple[PeerOutputs, PeerOutputs]:
    """What a network and its teachers might say; every third number is large."""
    peers, shape = objective.num_peers, (IMAGES, CLASSES)
    ensemble = noise(*shape).requires_grad_() if objective.has_ensemble else None
    targets = noise(peers - 1, *shape)
    student = PeerOutputs((3 * noise(peers, *shape)).requires_grad_(), [], ensemble, targets)
    return student, PeerOutputs(noise(peers, *shape), [], None)


def naive(logits: Tensor, labels_BC: Tensor) -> float:
    """-sum_c y_c log p_c, averaged over the batch, loop by loop."""
    p, y, total = softened(as_numpy(logits), 1.0), as_numpy(labels_BC), 0.0
    for image in range(IMAGES):
        for label in range(CLASSES):
            total -= y[image, label] * math.log(p[image, label])
    return total / IMAGES


def soft_labels() -> Tensor:
    return noise(IMAGES, CLASSES).mul(2).softmax(1)


def terms_of(objective: Objective, said: tuple[PeerOutputs, PeerOutputs], labels: Tensor) -> Tensor:
    return objective.terms(*said, labels, 0.3)


@pytest.mark.parametrize("case", CASES)
def test_cross_entropies_are_those_of_the_weights_and_the_rest_is_as_ever(case: str) -> None:
    objective, labels_BC = objective_of(case), soft_labels()
    said = outputs_of(objective)
    student = said[0]
    hard = terms_of(objective, said, LABELS)
    soft = terms_of(objective, said, labels_BC)
    share = getattr(getattr(objective, "options", None), "beta", 1.0)
    for name, found, before in zip(objective.term_names, soft.tolist(), hard.tolist(), strict=True):
        kind, _, head = name.partition("/")
        if kind == "ce":
            heads = student.ensemble_logits_BC, *student.logits_VBC
            logits = heads[0 if head == "ensemble" else int(head.removeprefix("peer"))]
            assert logits is not None
            assert math.isclose(found, share * naive(logits, labels_BC), rel_tol=1e-12), name
        elif method_of(case) not in DISTILS_BY_LABELS:
            assert found == before, name


@pytest.mark.parametrize("case", [case for case in CASES if method_of(case) not in DISTILS_BY_LABELS])
def test_gradients_of_labels_are_p_less_the_weights(case: str) -> None:
    """The difference between two labels moves the gradient by the difference of the weights, and no more."""
    objective, labels_BC = objective_of(case), soft_labels()
    said = outputs_of(objective)
    share = getattr(getattr(objective, "options", None), "beta", 1.0)
    z = said[0].logits_VBC
    by_soft, by_hard = (
        torch.autograd.grad(terms_of(objective, said, labels).sum(), z)[0] for labels in (labels_BC, LABELS)
    )
    onehot = torch.nn.functional.one_hot(LABELS, CLASSES)
    expected = (share * (onehot - labels_BC) / IMAGES).expand_as(z)
    torch.testing.assert_close(by_soft - by_hard, expected, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("case", CASES)
def test_all_weight_on_a_class_is_that_label(case: str) -> None:
    objective = objective_of(case)
    said, onehot = outputs_of(objective), torch.nn.functional.one_hot(LABELS, CLASSES).double()
    hard, soft = (
        objective.loss(*said, labels, torch.tensor(0.3, dtype=torch.float64)) for labels in (LABELS, onehot)
    )
    torch.testing.assert_close(soft.terms, hard.terms, rtol=1e-12, atol=1e-12)
    assert torch.equal(soft.correct, hard.correct)


def test_the_class_of_the_largest_weight_counts() -> None:
    answers = torch.tensor([3, 1, 4, 1, 5])
    logits = torch.nn.functional.one_hot(answers, CLASSES).float()
    student = PeerOutputs(torch.stack([logits, logits.roll(1, 0)]), [], logits)
    labels_BC = torch.full((IMAGES, CLASSES), 0.1)
    labels_BC[range(IMAGES), [3, 1, 4, 0, 0]] = 0.4
    labels_BC[range(IMAGES), [0, 0, 0, 1, 5]] = 0.3
    assert count_correct(student, labels_BC).tolist() == [3, 0, 3]
