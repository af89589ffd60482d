"""Collaborative learning against its equation in numpy loops."""

import pytest
import torch

from pcl_fast.config import ClConfig
from pcl_fast.objectives.cl import CollaborativeLearning
from tests.objectives.oracles import (
    as_numpy,
    check_terms,
    hard_gradient,
    hard_terms,
    named_terms,
    noise,
    said,
    soft_cross_entropy,
    softened_gradient,
)

LABELS = torch.tensor([0, 6, 2, 2])


def others_mean(z: torch.Tensor, head: int) -> torch.Tensor:
    return torch.stack([z[k] for k in range(len(z)) if k != head]).mean(0)


@pytest.mark.parametrize(("beta", "temperature"), [(0.5, 2.0), (0.8, 5.0), (1.0, 2.0)])
@pytest.mark.parametrize("m", [2, 3, 8])
def test_terms_are_those_of_the_paper(m: int, beta: float, temperature: float) -> None:
    z = noise(m, 4, 7)
    objective = CollaborativeLearning(ClConfig(num_heads=m, beta=beta, temperature=temperature))
    expected = {name: beta * value for name, value in hard_terms(z, LABELS).items()}
    for j in range(m):
        soft = soft_cross_entropy(as_numpy(others_mean(z, j)), as_numpy(z[j]), temperature)
        expected[f"cl/peer{j + 1}"] = (1 - beta) * temperature**2 * soft
    check_terms(named_terms(objective, said(z), LABELS), expected)


def test_defaults_and_what_is_asked_of_the_network() -> None:
    objective = CollaborativeLearning(ClConfig(num_heads=4))
    assert (objective.options.beta, objective.options.temperature) == (0.5, 2.0)
    assert objective.split_gradient == 0.25
    assert (objective.num_views, objective.shares_trunk, objective.has_ensemble) == (1, True, False)


def test_gradients_hold_the_targets_still() -> None:
    z = noise(3, 4, 7).requires_grad_()
    terms = CollaborativeLearning(ClConfig(beta=0.3)).terms(said(z), None, LABELS, 1.0)
    (found,) = torch.autograd.grad(terms.sum(), z)
    for j in range(3):
        soft = 0.7 * 2.0**2 * softened_gradient(others_mean(z, j), z[j], 2.0)
        expected = 0.3 * hard_gradient(z[j], LABELS) + soft
        torch.testing.assert_close(found[j], expected, rtol=1e-10, atol=1e-14)


def test_the_ramp_and_a_constant_added_to_logits_change_nothing() -> None:
    z, objective = noise(3, 4, 7), CollaborativeLearning(ClConfig())
    terms = objective.terms(said(z), None, LABELS, 0.0)
    moved = objective.terms(said(z + noise(3, 4, 1)), None, LABELS, 100.0)
    torch.testing.assert_close(moved, terms, rtol=1e-10, atol=1e-12)
