"""OKDDip against its equation in numpy loops."""

import pytest
import torch
from torch import Tensor

from pcl_fast.config import OkddipConfig
from pcl_fast.contract import HeadShapes, PeerOutputs, PeerParts
from pcl_fast.objectives.okddip import Attention, DiversePeers
from tests.objectives.oracles import (
    as_numpy,
    check_terms,
    hard_gradient,
    hard_terms,
    kl,
    named_terms,
    noise,
    softened_gradient,
)

LABELS = torch.tensor([0, 6, 2, 2])


def outputs(z: Tensor, targets: Tensor, mean: Tensor) -> PeerOutputs:
    return PeerOutputs(z, (), mean, targets)


def attention(peers: int, width: int = 16) -> Attention:
    shapes = HeadShapes(num_peers=peers, num_classes=7, feature_dims=(width,) * peers, trunk_channels=1)
    return Attention(shapes).double()


@pytest.mark.parametrize("weight", [0.0, 0.3])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("peers", [2, 3, 7])
def test_terms_are_those_of_the_paper(peers: int, temperature: float, weight: float) -> None:
    z, targets, mean = noise(peers + 1, 4, 7), noise(peers, 4, 7), noise(4, 7)
    objective = DiversePeers(OkddipConfig(num_peers=peers, temperature=temperature))
    expected = hard_terms(z, LABELS)
    for j, target in enumerate([*targets, mean]):
        taught = kl(as_numpy(target), as_numpy(z[j]), temperature)
        expected[f"kd/peer{j + 1}"] = weight * temperature**2 * taught
    check_terms(named_terms(objective, outputs(z, targets, mean), LABELS, weight), expected)


def test_gradients_hold_the_leaders_target_still_but_not_the_attention() -> None:
    z, targets, mean = (noise(*shape).requires_grad_() for shape in ((4, 4, 7), (3, 4, 7), (4, 7)))
    terms = DiversePeers(OkddipConfig()).terms(outputs(z, targets, mean), None, LABELS, 0.3)
    of_z, of_targets, of_mean = torch.autograd.grad(terms.sum(), [z, targets, mean], allow_unused=True)
    assert of_mean is None
    assert of_targets.abs().amax((1, 2)).min() > 1e-3
    for j, target in enumerate([*targets, mean]):
        expected = hard_gradient(z[j], LABELS) + 0.3 * 3.0**2 * softened_gradient(target, z[j], 3.0)
        torch.testing.assert_close(of_z[j], expected, rtol=1e-10, atol=1e-14)


def test_targets_are_attended_to_logits_and_the_leader_is_left_out() -> None:
    head, h, z = attention(4), noise(4, 5, 16), noise(4, 5, 7)
    found = head(PeerParts(noise(5, 1, 1, 1), [], list(h), list(z)))
    torch.testing.assert_close(found.logits_BC, (z[0] + z[1] + z[2]) / 3)
    wq, wk = head.query.weight, head.key.weight
    assert wq.shape == wk.shape == (2, 16)
    assert head.query.bias is head.key.bias is None
    assert found.targets_KBC is not None
    assert found.targets_KBC.shape == (3, 5, 7)
    for image in range(5):
        for a in range(3):
            scores = [torch.dot(wq @ h[a, image], wk @ h[b, image]) for b in range(3)]
            alpha = torch.stack(scores).exp() / torch.stack(scores).exp().sum()
            expected = sum(alpha[b] * z[b, image] for b in range(3))
            torch.testing.assert_close(found.targets_KBC[a, image], expected, rtol=1e-10, atol=1e-12)


def test_the_attention_learns_and_the_logits_of_targets_do_not() -> None:
    head, h, z = attention(4), noise(4, 5, 16).requires_grad_(), noise(4, 5, 7).requires_grad_()
    targets = head(PeerParts(noise(5, 1, 1, 1), [], list(h.unbind()), list(z.unbind()))).targets_KBC
    assert targets is not None
    sources = [h, z, head.query.weight, head.key.weight]
    of_h, of_z, *of_weights = torch.autograd.grad(targets.sin().sum(), sources, allow_unused=True)
    assert of_z is None
    assert of_h[:3].abs().amax((1, 2)).min() > 1e-4
    assert not of_h[3].any(), "the leader is attended by nobody"
    assert all(grad.abs().max() > 1e-4 for grad in of_weights)


def test_a_constant_added_to_logits_changes_nothing() -> None:
    z, targets, mean, objective = noise(4, 4, 7), noise(3, 4, 7), noise(4, 7), DiversePeers(OkddipConfig())
    terms = objective.terms(outputs(z, targets, mean), None, LABELS, 0.3)
    moved = outputs(z + noise(4, 4, 1), targets + noise(3, 4, 1), mean + noise(4, 1))
    torch.testing.assert_close(objective.terms(moved, None, LABELS, 0.3), terms, rtol=1e-10, atol=1e-12)


def test_the_leader_is_one_more_and_is_deployed() -> None:
    objective = DiversePeers(OkddipConfig())
    assert (objective.num_peers, objective.num_views) == (4, 1)
    assert (objective.deployment.network, objective.deployment.peer) == ("student", 3)
    assert objective.headline == {"OKDDip": "peer4", "OKDDip-E": "ensemble"}
