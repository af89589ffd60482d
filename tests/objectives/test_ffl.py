"""FFL against its equation in numpy loops."""

import pytest
import torch

from pcl_fast.config import FflConfig
from pcl_fast.objectives.ffl import FeatureFusion
from tests.objectives.oracles import (
    as_numpy,
    check_terms,
    cross_entropy,
    hard_gradient,
    hard_terms,
    kl,
    named_terms,
    noise,
    said,
    softened_gradient,
)

LABELS = torch.tensor([0, 6, 2, 2])


@pytest.mark.parametrize("weight", [0.0, 0.3])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("m", [2, 3, 8])
def test_terms_are_those_of_the_paper(m: int, temperature: float, weight: float) -> None:
    z, z_f = noise(m, 4, 7), noise(4, 7)
    objective = FeatureFusion(FflConfig(num_peers=m, temperature=temperature))
    factor = weight * temperature**2
    expected = hard_terms(z, LABELS) | {"ce/ensemble": cross_entropy(as_numpy(z_f), LABELS.tolist())}
    for j in range(m):
        expected[f"kd/peer{j + 1}"] = factor * kl(as_numpy(z_f), as_numpy(z[j]), temperature)
    mean = as_numpy(sum((z[j] for j in range(m)), torch.zeros(4, 7)) / m)
    expected["kd/ensemble"] = factor * kl(mean, as_numpy(z_f), temperature)
    check_terms(named_terms(objective, said(z, z_f), LABELS, weight), expected)


def test_gradients_hold_both_targets_still() -> None:
    z, z_f = noise(3, 4, 7).requires_grad_(), noise(4, 7).requires_grad_()
    terms = FeatureFusion(FflConfig()).terms(said(z, z_f), None, LABELS, 0.3)
    of_peers, of_fused = torch.autograd.grad(terms.sum(), [z, z_f])
    mean = (z[0] + z[1] + z[2]) / 3
    expected = hard_gradient(z_f, LABELS) + 0.3 * 3.0**2 * softened_gradient(mean, z_f, 3.0)
    torch.testing.assert_close(of_fused, expected, rtol=1e-10, atol=1e-14)
    for j in range(3):
        expected = hard_gradient(z[j], LABELS) + 0.3 * 3.0**2 * softened_gradient(z_f, z[j], 3.0)
        torch.testing.assert_close(of_peers[j], expected, rtol=1e-10, atol=1e-14)


def test_a_constant_added_to_logits_changes_nothing() -> None:
    z, z_f, objective = noise(3, 4, 7), noise(4, 7), FeatureFusion(FflConfig())
    terms = objective.terms(said(z, z_f), None, LABELS, 0.3)
    moved = objective.terms(said(z + noise(3, 4, 1), z_f + noise(4, 1)), None, LABELS, 0.3)
    torch.testing.assert_close(moved, terms, rtol=1e-10, atol=1e-12)


def test_both_results_are_reported_and_the_fusion_has_a_decay_of_its_own() -> None:
    objective = FeatureFusion(FflConfig())
    assert objective.headline == {"FFL-S": "peer1", "FFL": "ensemble"}
    assert objective.deployment.peer == 0
    assert objective.head_weight_decay == 1e-5
    with pytest.raises(AssertionError, match="needs its fusion"):
        objective.terms(said(noise(3, 4, 7)), None, LABELS, 1.0)
