"""KDCL's general target: C and its weights against loops in numpy, and a search that knows no inverse."""

import numpy as np
import pytest
import torch
from torch import Tensor

from pcl_fast.config import KdclConfig
from pcl_fast.objectives.kdcl import RIDGE, Kdcl, least_error_weights
from tests.objectives.oracles import (
    Matrix,
    as_numpy,
    check_terms,
    hard_gradient,
    hard_terms,
    kl,
    named_terms,
    noise,
    said,
    softened,
    softened_gradient,
)

LABELS = torch.tensor([0, 6, 2, 2])


def general(m: int, temperature: float = 2.0, weight: float = 1.0) -> Kdcl:
    return Kdcl(KdclConfig(num_peers=m, target="general", temperature=temperature, weight=weight))


def errors_of(z: Matrix, hot: Matrix) -> Matrix:
    """C_ij, summed over images and classes."""
    count = len(z)
    errors = np.zeros((count, count))
    for i in range(count):
        for j in range(count):
            fi, fj = softened(z[i], 1.0), softened(z[j], 1.0)
            for image in range(z.shape[1]):
                for c in range(z.shape[2]):
                    target = hot[image, c]
                    errors[i, j] += (fi[image, c] - target) * (fj[image, c] - target)
    return errors


def cost(weights: Tensor, errors: Tensor) -> float:
    return float(weights @ errors @ weights)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("m", [2, 3, 8])
def test_errors_are_added_up_over_images_and_classes(m: int, soft: bool) -> None:
    z = 3 * noise(m, 4, 7)
    hot = torch.nn.functional.one_hot(LABELS, 7).double()
    labels = 0.7 * hot + 0.3 * hot.roll(1, 0) if soft else LABELS
    found = general(m).observe(said(z), labels)
    assert found.dtype == torch.float64
    expected = errors_of(as_numpy(z), as_numpy(labels if soft else hot))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-10)
    parts = [general(m).observe(said(z[:, rows]), labels[rows]) for rows in (slice(3), slice(3, 4))]
    torch.testing.assert_close(parts[0] + parts[1], found, rtol=1e-12, atol=0)
    half = general(m).observe(said(z.bfloat16()), labels)
    assert half.dtype == torch.float64
    torch.testing.assert_close(half, found, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("m", [1, 2, 3, 8])
def test_weights_are_the_inverse_s_row_sums(m: int) -> None:
    torch.manual_seed(m)
    factors = noise(m, 40) + 0.5 * noise(1, 40)
    errors = factors @ factors.t() / 40
    found = least_error_weights(errors)
    ridge = RIDGE * np.trace(as_numpy(errors)) / m * np.eye(m)
    inverse = np.linalg.inv(as_numpy(errors) + ridge)
    np.testing.assert_allclose(found.numpy(), inverse.sum(1) / inverse.sum(), rtol=1e-9)
    assert found.dtype == torch.float64
    torch.testing.assert_close(least_error_weights(1e-7 * errors), found, rtol=1e-9, atol=0)
    for _ in range(300):  # none of sum 1 is better by more than the ridge is worth
        step = 10 ** -float(torch.rand(())) * noise(m)
        other = found + step - step.mean()
        worth = float(errors.diagonal().mean()) * RIDGE * (float(other @ other) - float(found @ found))
        assert cost(found, errors) <= cost(other, errors) + worth + 1e-12


def test_two_networks_without_common_errors_are_weighed_by_their_precision() -> None:
    """The textbook's case: 1 / C_11 to 1 / C_22; and an error that the other one has, too, is subtracted."""
    found = least_error_weights(torch.tensor([[1.0, 0.0], [0.0, 3.0]]).double())
    torch.testing.assert_close(found, torch.tensor([0.75, 0.25]).double(), rtol=2e-3, atol=0)
    found = least_error_weights(torch.tensor([[1.0, 1.5], [1.5, 4.0]]).double())
    torch.testing.assert_close(found, torch.tensor([1.25, -0.25]).double(), rtol=2e-2, atol=0)


@pytest.mark.parametrize("m", [2, 3, 8])
@pytest.mark.parametrize("case", ["equal", "perfect", "one perfect", "tiny", "huge", "rank one"])
def test_a_singular_matrix_leaves_finite_weights(m: int, case: str) -> None:
    one = torch.ones(m, dtype=torch.float64)
    alone = torch.arange(m).double().clamp(max=1)
    scale = {"perfect": 0.0, "tiny": 1e-300, "huge": 1e300}.get(case, 1.0)
    factor = {"one perfect": alone, "rank one": 1 + torch.arange(m).double()}.get(case, one)
    found = least_error_weights(scale * torch.outer(factor, factor))
    assert found.isfinite().all()
    torch.testing.assert_close(found.sum(), torch.ones(()).double(), rtol=1e-9, atol=0)
    assert found @ found <= 1 + 1 / RIDGE
    if case not in ("one perfect", "rank one"):
        torch.testing.assert_close(found, one / m, rtol=1e-6, atol=0)
    if case == "one perfect":
        assert found[0] > 0.99


def test_until_images_were_looked_at_all_networks_weigh_the_same() -> None:
    z, objective = noise(3, 4, 7), general(3, temperature=3.0, weight=0.7)
    assert objective.wants_held_out
    expected = hard_terms(z, LABELS)
    for j in range(3):
        expected[f"kd/peer{j + 1}"] = 0.7 * 3.0**2 * kl(as_numpy(z.mean(0)), as_numpy(z[j]), 3.0)
    check_terms(named_terms(objective, said(z), LABELS), expected)


def test_the_target_is_the_combination_of_what_was_concluded() -> None:
    """In the memory that a captured step reads."""
    z, seen, objective = noise(3, 4, 7).requires_grad_(), 3 * noise(3, 4, 7), general(3)
    objective.move_memory(torch.device("cpu"))
    memory = objective.memory["weights"]
    objective.conclude(objective.observe(said(seen), LABELS), 4)
    assert objective.memory["weights"] is memory
    hot = torch.nn.functional.one_hot(LABELS, 7).double()
    expected = least_error_weights(torch.from_numpy(errors_of(as_numpy(seen), as_numpy(hot))))
    torch.testing.assert_close(memory, expected, rtol=1e-9, atol=0)
    assert (memory - 1 / 3).abs().max() > 0.01
    taught_by = torch.einsum("v,vbc->bc", memory, z.detach())
    (found,) = torch.autograd.grad(objective.terms(said(z), None, LABELS, 0.0).sum(), z)
    for j in range(3):
        exact = hard_gradient(z[j], LABELS) + 2.0**2 * softened_gradient(taught_by, z[j], 2.0)
        torch.testing.assert_close(found[j], exact, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_teaches_nothing(value: float) -> None:
    objective, seen = general(2), 3 * noise(2, 4, 7)
    objective.conclude(objective.observe(said(seen), LABELS), 4)
    before = objective.memory["weights"].clone()
    seen[1, 2, 3] = value
    objective.conclude(objective.observe(said(seen), LABELS), 4)
    assert torch.equal(objective.memory["weights"], before)


@pytest.mark.parametrize("target", ["naive", "linear", "minlogit"])
def test_other_targets_want_nothing_held_out(target: str) -> None:
    objective = Kdcl(KdclConfig(target=target))  # pyright: ignore[reportArgumentType]
    assert not objective.wants_held_out
    assert objective.memory == {}
