"""PCL's losses against torch's own KL divergence, and what the objective asks of the rest."""

import pytest
import torch
import torch.nn.functional as F

from pcl_fast.config import PclConfig
from pcl_fast.objectives.base import full_precision, peer_cross_entropies
from pcl_fast.objectives.pcl import Pcl, ensemble_distillation, mean_teacher_distillation
from tests.objectives.oracles import noise, said


def torch_kl(teacher: torch.Tensor, student: torch.Tensor, temperature: float) -> torch.Tensor:
    target, log_p = F.softmax(teacher / temperature, 1), F.log_softmax(student / temperature, 1)
    return temperature**2 * F.kl_div(log_p, target, reduction="batchmean")


@pytest.mark.parametrize("temperature", [1.0, 3.0, 20.0])
@pytest.mark.parametrize("m", [2, 3, 8])
def test_values_and_gradients_are_those_of_torchs_kl_divergence(m: int, temperature: float) -> None:
    z, z_t, q = noise(m, 4, 7).requires_grad_(), noise(4, 7), noise(m, 4, 7)
    pe, pm = ensemble_distillation(z_t, z, temperature), mean_teacher_distillation(q, z, temperature)
    for j in range(m):
        torch.testing.assert_close(pe[j], torch_kl(z_t, z[j], temperature), rtol=1e-12, atol=1e-14)
        others = [torch_kl(q[k], z[j], temperature) for k in range(m) if k != j]
        torch.testing.assert_close(pm[j], sum(others) / (m - 1), rtol=1e-12, atol=1e-13)
    (found,) = torch.autograd.grad((pe + pm).sum(), z)
    pairs = [torch_kl(q[k], z[j], temperature) / (m - 1) for j in range(m) for k in range(m) if k != j]
    expected = torch.stack([torch_kl(z_t, z[j], temperature) for j in range(m)] + pairs).sum()
    torch.testing.assert_close(found, torch.autograd.grad(expected, z)[0], rtol=1e-10, atol=1e-14)


def test_peers_that_agree_with_their_teachers_lose_nothing() -> None:
    z = noise(1, 4, 7).expand(3, 4, 7)
    assert ensemble_distillation(z[0], z, 3.0).abs().max() < 1e-12
    assert mean_teacher_distillation(z, z, 3.0).abs().max() < 1e-12


def test_extreme_logits_stay_finite_in_float32() -> None:
    """Sure teachers and wrong peers: log p of -2e4 and p of 0 make a large loss, not a nan."""
    sure = torch.full((2, 3, 5), -1e4)
    sure[..., 0] = 1e4
    wrong = sure.roll(1, -1).requires_grad_()
    terms = Pcl(PclConfig(num_peers=2)).terms(said(wrong, sure[0]), said(sure), torch.zeros(3).long(), 1.0)
    assert terms.isfinite().all()
    terms.sum().backward()
    assert wrong.grad is not None
    assert wrong.grad.isfinite().all()


def test_float32_is_as_exact_as_a_loss_need_be() -> None:
    """Summing over all teachers less the peer's own loses little, also for 1,000 classes and 8 peers."""
    z, q = 3 * noise(8, 4, 1000), 3 * noise(8, 4, 1000)
    exact = mean_teacher_distillation(q, z, 3.0)
    torch.testing.assert_close(
        mean_teacher_distillation(q.float(), z.float(), 3.0).double(), exact, rtol=1e-5, atol=2e-5
    )


def test_cross_entropy_is_that_of_every_peer() -> None:
    z, labels = noise(3, 5, 7), torch.tensor([0, 6, 2, 2, 1])
    found = peer_cross_entropies(z, labels)
    torch.testing.assert_close(found, torch.stack([F.cross_entropy(z[j], labels) for j in range(3)]))


def test_precision_is_raised_never_lowered() -> None:
    kinds = {torch.float16: torch.float32, torch.bfloat16: torch.float32, torch.float64: torch.float64}
    for given, expected in kinds.items():
        assert full_precision(torch.ones(2, dtype=given)).dtype == expected
    logits = torch.ones(2)
    assert full_precision(logits).data_ptr() == logits.data_ptr()


@pytest.mark.parametrize("m", [1, 2, 5])
@pytest.mark.parametrize("teachers", [(True, True), (False, True), (True, False), (False, False)])
def test_every_term_has_a_name_of_its_own(m: int, teachers: tuple[bool, bool]) -> None:
    options = PclConfig(num_peers=m, ensemble_teacher=teachers[0], mean_teacher=teachers[1])
    objective = Pcl(options)
    terms = objective.terms(
        said(noise(m, 2, 5), noise(2, 5)), said(noise(m, 2, 5)), torch.tensor([0, 1]), 1.0
    )
    assert terms.shape == (len(objective.term_names),)
    assert len(set(objective.term_names)) == len(objective.term_names)
    assert objective.term_names[: m + 1] == (*(f"ce/peer{j + 1}" for j in range(m)), "ce/ensemble")


def test_missing_inputs_are_refused() -> None:
    z, labels = noise(3, 2, 5), torch.tensor([0, 1])
    with pytest.raises(AssertionError, match="needs its classifier"):
        Pcl(PclConfig()).terms(said(z), said(z), labels, 1.0)
    with pytest.raises(AssertionError, match="needs the mean teachers"):
        Pcl(PclConfig()).terms(said(z, z[0]), None, labels, 1.0)
    assert Pcl(PclConfig(mean_teacher=False)).terms(said(z, z[0]), None, labels, 1.0).isfinite().all()
