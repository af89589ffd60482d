"""KDCL against its equations in numpy loops, and its best combination against a slow convex search."""

import itertools
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pcl_fast.config import KdclConfig
from pcl_fast.objectives.combination import best_weights
from pcl_fast.objectives.kdcl import Kdcl, linear_target, minlogit_target, naive_target
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
TARGETS = {"naive": naive_target, "linear": linear_target, "minlogit": minlogit_target}
TargetName = Literal["naive", "linear", "minlogit"]


def combined_cost(weights_BV: Tensor, z_VBC: Tensor, labels: Tensor) -> Tensor:
    """CE(sum_v a_v z_v, y) of each image."""
    logits = torch.einsum("bv,vbc->bc", weights_BV.double(), z_VBC.double())
    return F.cross_entropy(logits, labels, reduction="none")


def searched_weights(z_VBC: Tensor, labels: Tensor, sweeps: int = 20) -> Tensor:
    """By moving weight between one pair after the other as far as that helps, found by bisection."""
    z = z_VBC.double().transpose(0, 1)
    count, weights = z.shape[1], torch.full(z.shape[:2], 1 / z.shape[1], dtype=torch.float64)
    hot = F.one_hot(labels, z.shape[2]).double()
    for _, (i, k) in itertools.product(range(sweeps), itertools.combinations(range(count), 2)):
        logits, direction = torch.einsum("bv,bvc->bc", weights, z), z[:, i] - z[:, k]
        low, high = -weights[:, i], weights[:, k]
        for _ in range(40):
            middle = (low + high) / 2
            slope = (((logits + middle[:, None] * direction).softmax(1) - hot) * direction).sum(1)
            low, high = torch.where(slope > 0, low, middle), torch.where(slope > 0, middle, high)
        weights[:, i] += (low + high) / 2
        weights[:, k] -= (low + high) / 2
    return weights.clamp(min=0) / weights.clamp(min=0).sum(1, keepdim=True)


def duality_gap(weights_BV: Tensor, z_VBC: Tensor, labels: Tensor) -> Tensor:
    """A bound of how far each image's cross-entropy is from the least: a . g - min_v g_v, g its gradient."""
    z_BVC = z_VBC.double().transpose(0, 1)
    hot = labels if labels.is_floating_point() else F.one_hot(labels, z_BVC.shape[2])
    combined_BC = torch.einsum("bv,bvc->bc", weights_BV, z_BVC)
    gradient_BV = torch.einsum("bvc,bc->bv", z_BVC, combined_BC.softmax(1) - hot)
    return (weights_BV * gradient_BV).sum(1) - gradient_BV.amin(1)


def grid_cost(z_VBC: Tensor, labels: Tensor, parts: int) -> Tensor:
    """The least of all combinations in steps of 1 / parts."""
    steps = itertools.product(range(parts + 1), repeat=len(z_VBC) - 1)
    grid = [(*some, parts - sum(some)) for some in steps if sum(some) <= parts]
    logits = torch.einsum("gv,vbc->gbc", torch.tensor(grid).double() / parts, z_VBC.double())
    of_labels = logits.gather(2, labels[None, :, None].expand(len(grid), -1, 1))[..., 0]
    return (logits.logsumexp(2) - of_labels).amin(0)


@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0, 30.0, 200.0])
@pytest.mark.parametrize("m", [2, 3, 5, 8])
def test_the_best_combination_is_within_a_thousandth_of_the_least(m: int, scale: float) -> None:
    torch.manual_seed(m)
    z, labels = (scale * noise(m, 24, 10)).float(), torch.randint(10, (24,))
    weights = best_weights(z, labels)
    assert weights.min() >= 0
    torch.testing.assert_close(weights.sum(1), torch.ones(24).double(), rtol=1e-12, atol=0)
    cost = combined_cost(weights, z, labels)
    assert (cost - combined_cost(searched_weights(z, labels), z, labels)).max() < 1e-3
    if m <= 3:
        assert (cost - grid_cost(z, labels, 1000 if m == 2 else 100)).max() < 1e-3
    for single in F.one_hot(torch.arange(m), m).double():
        assert (cost - combined_cost(single.expand(24, m), z, labels)).max() < 1e-3
    target = linear_target(z, labels)
    assert target.dtype == torch.float32
    exact = torch.einsum("bv,vbc->bc", weights, z.double())
    torch.testing.assert_close(target.double(), exact, rtol=1e-5, atol=1e-6 * scale)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("scale", [0.01, 1.0, 5.0, 30.0])
@pytest.mark.parametrize(("m", "classes"), [(2, 1000), (3, 10), (3, 1000), (8, 10), (8, 100)])
def test_its_certificate_of_optimality(m: int, classes: int, scale: float, soft: bool) -> None:
    """By convexity no combination is better by more than the gap: that of the barrier, (m - 1) 1e-4."""
    torch.manual_seed(m)
    z, labels = (scale * noise(m, 64, classes)).float(), torch.randint(classes, (64,))
    other = 0.6 * F.one_hot(labels, classes) + 0.4 * F.one_hot(labels.flip(0), classes)
    weights = best_weights(z, other if soft else labels)
    assert weights.min() > 0
    gap = duality_gap(weights, z, other.double() if soft else labels)
    assert gap.max() < 1.5e-4 * m


def test_sure_networks_of_a_trained_ensemble_are_combined_best() -> None:
    """As after training: the label's logit is far ahead in most networks, another's in some."""
    labels = torch.randint(100, (200,))
    z = 2 * noise(3, 200, 100) + 15 * F.one_hot(labels, 100)
    wrong = torch.rand(3, 200) < 0.3
    z += 25 * wrong[..., None] * F.one_hot(torch.randint(100, (200,)), 100)
    assert duality_gap(best_weights(z, labels), z, labels).max() < 3.5e-4


@pytest.mark.parametrize("target", ["naive", "linear", "minlogit"])
def test_soft_labels_that_are_hard_are_the_same(target: TargetName) -> None:
    z, objective = noise(3, 4, 7), Kdcl(KdclConfig(target=target))
    terms = [objective.terms(said(z), None, y, 0.0) for y in (LABELS, F.one_hot(LABELS, 7).double())]
    torch.testing.assert_close(terms[1], terms[0], rtol=1e-9, atol=1e-12)


def test_soft_labels_pick_and_shift_by_their_weights() -> None:
    """Naive: the lowest -sum y log p; minlogit: less sum y z."""
    z, labels = noise(3, 4, 7), noise(4, 7).softmax(1)
    naive, least = naive_target(z, labels), minlogit_target(z, labels)
    for image in range(4):
        costs = [-(labels[image] * z[v, image].log_softmax(0)).sum().item() for v in range(3)]
        assert torch.equal(naive[image], z[costs.index(min(costs)), image])
        for c in range(7):
            expected = min((z[v, image, c] - (labels[image] * z[v, image]).sum()).item() for v in range(3))
            assert least[image, c].item() == pytest.approx(expected, rel=1e-12)


def test_networks_that_agree_or_are_perfect_leave_nothing_undefined() -> None:
    same = noise(1, 4, 7).expand(3, 4, 7)
    torch.testing.assert_close(linear_target(same, LABELS), same[0], rtol=1e-12, atol=1e-12)
    sure = 1e4 * F.one_hot(LABELS, 7).float().expand(3, 4, 7)
    torch.testing.assert_close(linear_target(sure, LABELS), sure[0])
    for target in TARGETS.values():
        assert target(torch.stack([sure[0], -sure[0]]), LABELS).isfinite().all()


def test_the_search_asks_the_host_for_nothing() -> None:
    """A fake tensor has no numbers: whoever asks for one fails."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        target = linear_target(torch.randn(3, 4, 7), torch.zeros(4, dtype=torch.int64))
    assert target.shape == (4, 7)


def test_naive_is_the_network_of_the_lowest_cross_entropy_of_each_image() -> None:
    z = noise(3, 4, 7)
    found = naive_target(z, LABELS)
    for image, label in enumerate(LABELS.tolist()):
        costs = [cross_entropy(as_numpy(z[v, image][None]), [label]) for v in range(3)]
        assert torch.equal(found[image], z[costs.index(min(costs)), image])


def test_minlogit_is_the_least_logit_less_the_labels_of_each_class() -> None:
    z = noise(3, 4, 7)
    found = minlogit_target(z, LABELS)
    for image, label in enumerate(LABELS.tolist()):
        for c in range(7):
            assert found[image, c] == min(z[v, image, c] - z[v, image, label] for v in range(3))


@pytest.mark.parametrize("target", ["naive", "linear", "minlogit"])
@pytest.mark.parametrize("m", [2, 5])
def test_terms_are_those_of_the_paper(m: int, target: TargetName) -> None:
    z, objective = noise(m, 4, 7), Kdcl(KdclConfig(num_peers=m, target=target, temperature=3.0, weight=0.7))
    taught_by, expected = as_numpy(TARGETS[target](z, LABELS)), hard_terms(z, LABELS)
    for j in range(m):
        expected[f"kd/peer{j + 1}"] = 0.7 * 3.0**2 * kl(taught_by, as_numpy(z[j]), 3.0)
    check_terms(named_terms(objective, said(z), LABELS), expected)


@pytest.mark.parametrize("target", ["naive", "linear", "minlogit"])
def test_gradients_hold_the_target_still(target: TargetName) -> None:
    z = noise(3, 4, 7).requires_grad_()
    terms = Kdcl(KdclConfig(target=target)).terms(said(z), None, LABELS, 0.0)
    (found,) = torch.autograd.grad(terms.sum(), z)
    taught_by = TARGETS[target](z.detach(), LABELS)
    for j in range(3):
        expected = hard_gradient(z[j], LABELS) + 2.0**2 * softened_gradient(taught_by, z[j], 2.0)
        torch.testing.assert_close(found[j], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("target", ["naive", "linear", "minlogit"])
def test_the_ramp_and_a_constant_added_to_logits_change_nothing(target: TargetName) -> None:
    z, objective = noise(3, 4, 7), Kdcl(KdclConfig(target=target))
    terms = objective.terms(said(z), None, LABELS, 0.0)
    assert terms[3:].min() > 0
    moved = objective.terms(said(z + noise(3, 4, 1)), None, LABELS, 100.0)
    torch.testing.assert_close(moved, terms, rtol=1e-9, atol=1e-12)


def test_each_network_has_views_of_its_own() -> None:
    objective = Kdcl(KdclConfig(num_peers=4))
    assert (objective.num_peers, objective.num_views, objective.shares_trunk) == (4, 4, False)
    assert Kdcl(KdclConfig(separate=False)).shares_trunk
    assert (objective.options.temperature, objective.options.weight) == (2.0, 1.0)
