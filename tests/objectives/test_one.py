"""ONE against its equation in numpy loops."""

import pytest
import torch

from pcl_fast.config import OneConfig
from pcl_fast.objectives.one import NativeEnsemble
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
    z, z_e = noise(m, 4, 7), noise(4, 7)
    objective = NativeEnsemble(OneConfig(num_peers=m, temperature=temperature))
    expected = hard_terms(z, LABELS) | {"ce/ensemble": cross_entropy(as_numpy(z_e), LABELS.tolist())}
    for j in range(m):
        taught = kl(as_numpy(z_e), as_numpy(z[j]), temperature)
        expected[f"kd/peer{j + 1}"] = weight * temperature**2 * taught
    check_terms(named_terms(objective, said(z, z_e), LABELS, weight), expected)


def test_gradients_hold_the_target_still() -> None:
    z, z_e = noise(3, 4, 7).requires_grad_(), noise(4, 7).requires_grad_()
    terms = NativeEnsemble(OneConfig()).terms(said(z, z_e), None, LABELS, 0.3)
    of_peers, of_ensemble = torch.autograd.grad(terms.sum(), [z, z_e])
    torch.testing.assert_close(of_ensemble, hard_gradient(z_e, LABELS), rtol=1e-10, atol=1e-14)
    for j in range(3):
        expected = hard_gradient(z[j], LABELS) + 0.3 * 3.0**2 * softened_gradient(z_e, z[j], 3.0)
        torch.testing.assert_close(of_peers[j], expected, rtol=1e-10, atol=1e-14)


def test_a_constant_added_to_logits_changes_nothing() -> None:
    z, z_e, objective = noise(3, 4, 7), noise(4, 7), NativeEnsemble(OneConfig())
    terms = objective.terms(said(z, z_e), None, LABELS, 0.3)
    moved = objective.terms(said(z + noise(3, 4, 1), z_e + noise(4, 1)), None, LABELS, 0.3)
    torch.testing.assert_close(moved, terms, rtol=1e-10, atol=1e-12)


def test_both_results_are_reported_and_the_first_branch_is_deployed() -> None:
    objective = NativeEnsemble(OneConfig())
    assert objective.headline == {"ONE": "peer1", "ONE-E": "ensemble"}
    assert (objective.deployment.network, objective.deployment.peer) == ("student", 0)
    assert objective.options.temperature == 3.0
    with pytest.raises(AssertionError, match="needs its gate"):
        objective.terms(said(noise(3, 4, 7)), None, LABELS, 1.0)
