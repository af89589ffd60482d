"""Deep mutual learning against its equation in numpy loops."""

import pytest
import torch

from pcl_fast.config import DmlConfig
from pcl_fast.objectives.dml import MutualLearning
from tests.objectives.oracles import (
    as_numpy,
    check_terms,
    hard_gradient,
    hard_terms,
    kl,
    named_terms,
    noise,
    said,
    softened_gradient,
)

LABELS = torch.tensor([0, 6, 2, 2])


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("m", [2, 3, 8])
def test_terms_are_those_of_the_paper(m: int, temperature: float) -> None:
    z, objective = noise(m, 4, 7), MutualLearning(DmlConfig(num_peers=m, temperature=temperature, weight=0.7))
    expected = hard_terms(z, LABELS)
    for j in range(m):
        others = [kl(as_numpy(z[k]), as_numpy(z[j]), temperature) for k in range(m) if k != j]
        expected[f"ml/peer{j + 1}"] = 0.7 * temperature**2 * sum(others) / (m - 1)
    check_terms(named_terms(objective, said(z), LABELS), expected)


def test_the_papers_temperature_and_weight_are_1_and_networks_are_apart() -> None:
    objective = MutualLearning(DmlConfig())
    assert (objective.options.temperature, objective.options.weight) == (1.0, 1.0)
    assert (objective.num_peers, objective.num_views, objective.shares_trunk) == (3, 1, False)
    assert MutualLearning(DmlConfig(separate=False)).shares_trunk
    assert (objective.deployment.network, objective.deployment.peer) == ("student", 0)


def test_gradients_hold_the_targets_still() -> None:
    """Were they not detached, a peer would also be moved by what it teaches."""
    m = 3
    z = noise(m, 4, 7).requires_grad_()
    terms = MutualLearning(DmlConfig(num_peers=m)).terms(said(z), None, LABELS, 1.0)
    (found,) = torch.autograd.grad(terms.sum(), z)
    for j in range(m):
        expected = hard_gradient(z[j], LABELS)
        for k in range(m):
            if k != j:
                expected = expected + softened_gradient(z[k], z[j], 1.0) / (m - 1)
        torch.testing.assert_close(found[j], expected, rtol=1e-10, atol=1e-14)


def test_the_ramp_and_a_constant_added_to_logits_change_nothing() -> None:
    z, objective = noise(3, 4, 7), MutualLearning(DmlConfig())
    terms = objective.terms(said(z), None, LABELS, 0.0)
    assert terms[3:].min() > 0.01
    moved = objective.terms(said(z + noise(3, 4, 1)), None, LABELS, 100.0)
    torch.testing.assert_close(moved, terms, rtol=1e-10, atol=1e-12)
    agreed = objective.terms(said(z[:1].expand(3, 4, 7)), None, LABELS, 1.0)
    assert agreed[3:].abs().max() < 1e-12
