"""Peer Collaborative Learning, equation by equation, in the order of the paper.

Wu and Gong, AAAI 2021, arXiv 2006.04147v2. The oracles are written out by hand: numpy in float64, explicit
loops, closed forms. m peers, B images a batch, C classes, T the temperature, e the 0-based epoch.
"""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pcl_fast.config import Config, PclConfig, TrainConfig
from pcl_fast.device import resolve
from pcl_fast.evaluate import evaluate_state
from pcl_fast.models.peers import PeerNetwork
from pcl_fast.models.zoo import find_backbone
from pcl_fast.presets import find_preset
from pcl_fast.schedules import ema_coefficient, learning_rate, rampup_weight
from pcl_fast.step.state import TrainState
from pcl_fast.step.train_step import train_step
from pipelines.synthetic import SyntheticEvalLoader, SyntheticOptions
from tests.objectives.oracles import as_numpy, cross_entropy, kl, noise, of_kind, softened, terms_of
from tests.step.tiny import (
    CLASSES,
    DECAY,
    SIZE,
    buffers,
    equal,
    make_batches,
    moment,
    parameters,
    tiny_state,
    train,
)


def resnet8(**options: Any) -> PeerNetwork:
    return PeerNetwork(find_backbone("resnet8"), CLASSES, **options).double()


def teacher_of(state: TrainState) -> PeerNetwork:
    assert state.mean_teacher is not None
    return state.mean_teacher.network


# 1. Architecture


def test_the_ensemble_teacher_is_one_linear_layer_over_the_concatenated_features() -> None:
    """Section 3.1: z_t = A [h_1; ...; h_m], with no gate and no mean of the peers' logits."""
    network = resnet8(num_peers=3)
    out = network(noise(3, 2, 3, SIZE, SIZE))
    assert isinstance(network.ensemble, nn.Linear)
    assert out.ensemble_logits_BC is not None
    A, bias = network.ensemble.weight.detach().numpy(), network.ensemble.bias.detach().numpy()
    for image in range(2):
        h = [out.features[peer][image].tolist() for peer in range(3)]
        concatenated = np.array(h[0] + h[1] + h[2])
        for label in range(CLASSES):
            expected = sum(A[label] * concatenated) + bias[label]
            assert out.ensemble_logits_BC[image, label].item() == pytest.approx(expected, rel=1e-12)


def test_peers_share_the_trunk_and_nothing_else() -> None:
    """Section 3.1: the plain network's layers are trunk, branch and classifier; m times but for the trunk."""
    network = resnet8(num_peers=3)
    plain = sum(p.numel() for p in find_backbone("resnet8").build(CLASSES).parameters())
    trunk = sum(p.numel() for p in network.trunk.parameters())
    A = (3 * 64 + 1) * CLASSES
    assert sum(p.numel() for p in network.parameters()) == trunk + 3 * (plain - trunk) + A
    first, second, third = (network.branches[j].state_dict()["stage3.0.body.0.weight"] for j in range(3))
    assert (first - second).abs().mean() > 0.01
    assert (second - third).abs().mean() > 0.01


# 2. Views


def test_every_view_goes_to_its_own_peer() -> None:
    """Section 3.1: h_j = f_j(view j); a change of view 2 reaches peer 2 and the ensemble alone."""
    network = resnet8(num_peers=3).eval()
    views = noise(3, 2, 3, SIZE, SIZE)
    before = network(views)
    after = network(torch.stack([views[0], views[1] + 1, views[2]]))
    changed = [not torch.equal(before.logits_VBC[j], after.logits_VBC[j]) for j in range(3)]
    assert changed == [False, True, False]
    assert not torch.equal(before.ensemble_logits_BC, after.ensemble_logits_BC)


def test_the_mean_teacher_of_a_peer_sees_the_view_of_that_peer() -> None:
    """Section 3.3: q_j is the mean teacher's answer to view j, by which L_pm is weighed in a step."""
    state = tiny_state()
    (batch,) = make_batches(1)
    views = batch.views_VBCHW
    student, teacher = copy.deepcopy(state.network), copy.deepcopy(teacher_of(state))
    terms = train_step(state, batch, moment(1)).terms
    z, q = student(views).logits_VBC, teacher(views).logits_VBC
    for j in range(3):
        others = [kl(as_numpy(q[k]), as_numpy(z[j]), 3.0) for k in range(3) if k != j]
        assert terms[7 + j].item() == pytest.approx(0.5 * 9 * sum(others) / 2, rel=1e-4)


def first_norm(network: PeerNetwork, views: Tensor) -> tuple[nn.Module, Tensor, Tensor]:
    """The stem's BatchNorm after a step in training, its running variance before, and its input."""
    norm = network.trunk.get_submodule("stem.1")
    norm.get_buffer("running_var").uniform_(0.5, 2)
    before, seen = norm.get_buffer("running_var").clone(), []
    norm.register_forward_hook(lambda _layer, inputs, _out: seen.append(inputs[0].detach()))
    network.train()(views)
    return norm, before, torch.cat(seen)


def test_the_running_statistics_take_one_update_a_view_in_order() -> None:
    """Section 2, bn_views=per_view: (1-a)^3 r + a[(1-a)^2 s1 + (1-a) s2 + s3], s unbiased, a = 0.1."""
    norm, r, x = first_norm(resnet8(num_peers=3), noise(3, 2, 3, SIZE, SIZE))
    s1, s2, s3 = (view.transpose(0, 1).flatten(1).var(1, correction=1) for view in x.chunk(3))
    expected = 0.9**3 * r + 0.1 * (0.9**2 * s1 + 0.9 * s2 + s3)
    torch.testing.assert_close(norm.get_buffer("running_var"), expected, rtol=1e-12, atol=0)


def test_joint_statistics_are_taken_over_all_views_at_once() -> None:
    """Section 2, bn_views=joint: (1-a) r + a s, s the variance over every view."""
    norm, r, x = first_norm(resnet8(num_peers=3, bn_views="joint"), noise(3, 2, 3, SIZE, SIZE))
    s = x.transpose(0, 1).flatten(1).var(1, correction=1)
    torch.testing.assert_close(norm.get_buffer("running_var"), 0.9 * r + 0.1 * s, rtol=1e-12, atol=0)


def test_without_a_view_a_peer_all_peers_see_the_same_image() -> None:
    """Table 4, the ablation: one view, one pass of the trunk, one update of its statistics."""
    state = tiny_state(view_per_peer=False)
    assert state.objective.num_views == 1
    (batch,) = make_batches(1, views=1)
    expected = copy.deepcopy(state.network)(batch.views_VBCHW.expand(3, -1, -1, -1, -1)).logits_VBC
    terms = train_step(state, batch, moment(1)).terms
    for j in range(3):
        ce = nn.functional.cross_entropy(expected[j], batch.labels_B)
        torch.testing.assert_close(terms[j], ce.detach(), rtol=1e-5, atol=1e-6)
    assert int(state.network.trunk.get_buffer("stem.1.num_batches_tracked")) == 1


# 3. Loss


@pytest.mark.parametrize(("m", "temperature"), [(1, 3.0), (2, 3.0), (3, 1.0), (3, 3.0), (5, 2.0), (8, 3.0)])
def test_the_loss_is_that_of_the_paper(m: int, temperature: float) -> None:
    """Eqs. 1-3, 5-6: L = sum_j CE(z_j,y) + CE(z_t,y) + L_pe + L_pm; the peers' CE is summed, not averaged."""
    z, z_t, q, w = 2 * noise(m, 4, 6), 2 * noise(4, 6), 2 * noise(m, 4, 6), 0.7
    found = terms_of(PclConfig(num_peers=m, temperature=temperature), z, z_t, q, w)
    labels = [0, 1, 2, 3]
    peers, means, ensemble = list(as_numpy(z)), list(as_numpy(q)), as_numpy(z_t)
    loss = cross_entropy(ensemble, labels)
    for j in range(m):
        loss += cross_entropy(peers[j], labels)
        loss += w * temperature**2 * kl(ensemble, peers[j], temperature)  # L_pe, eq. 3
        for k in range(m):
            if k != j:  # L_pm, eq. 5
                loss += w * temperature**2 / (m - 1) * kl(means[k], peers[j], temperature)
    assert torch.stack(list(found.values())).sum().item() == pytest.approx(loss, rel=1e-12)


def test_the_ensemble_teacher_teaches_every_peer() -> None:
    """Eq. 3: L_pe = w(e) T^2 sum_j KL(p_t^T || p_j^T), the teacher's distribution first."""
    z, z_t = noise(3, 2, 5), noise(2, 5)
    found = of_kind("pe", terms_of(PclConfig(), z, z_t, z, weight=0.25))
    expected = [0.25 * 9 * kl(as_numpy(z_t), as_numpy(z[j]), 3.0) for j in range(3)]
    assert found == pytest.approx(expected, rel=1e-12)


def test_the_mean_teachers_of_the_others_teach_a_peer_by_their_mean() -> None:
    """Eq. 5: L_pm = w(e) T^2 1/(m-1) sum_j sum_{k != j} KL(q_k^T || p_j^T)."""
    z, q = noise(3, 2, 5), noise(3, 2, 5)
    found = of_kind("pm", terms_of(PclConfig(), z, z[0], q, weight=0.25))
    pairs = [(1, 2), (0, 2), (0, 1)]
    for j, others in enumerate(pairs):
        expected = sum(kl(as_numpy(q[k]), as_numpy(z[j]), 3.0) for k in others) / 2
        assert found[j] == pytest.approx(0.25 * 9 * expected, rel=1e-12)


@pytest.mark.parametrize("peer", [0, 1, 2])
def test_no_peer_is_taught_by_its_own_mean_teacher(peer: int) -> None:
    """Eq. 5: k != j."""
    z, q = noise(3, 2, 5), noise(3, 2, 5)
    before = of_kind("pm", terms_of(PclConfig(), z, z[0], q, weight=1.0))
    q[peer] = noise(2, 5)
    after = of_kind("pm", terms_of(PclConfig(), z, z[0], q, weight=1.0))
    changed = [abs(new - old) > 1e-9 for new, old in zip(after, before, strict=True)]
    assert changed == [other != peer for other in range(3)]


@pytest.mark.parametrize("kind", ["pe", "pm"])
@pytest.mark.parametrize("temperature", [1.0, 3.0, 10.0])
def test_t_squared_keeps_the_gradient_of_small_logits(temperature: float, kind: str) -> None:
    """Eqs. 3, 5: for small logits d(T^2 KL)/dz = (z - z_teacher) / (B C), less its mean, whatever T is."""
    target, z = 1e-4 * noise(1, 2, 5), (1e-4 * noise(3, 2, 5)).requires_grad_()
    terms = terms_of(PclConfig(temperature=temperature), z, target[0], target.expand(3, 2, 5), weight=1.0)
    total = torch.stack([value for name, value in terms.items() if name.startswith(kind)]).sum()
    (gradient,) = torch.autograd.grad(total, z)
    apart = z.detach() - target
    expected = (apart - apart.mean(-1, keepdim=True)) / (2 * 5)
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-8)


def test_the_weight_rises_over_alpha_epochs_to_lambda() -> None:
    """Eq. 6: w(e) = lambda exp(-5 (1 - e/alpha)^2) for e <= alpha, lambda after; alpha = 0 is no ramp-up."""
    assert rampup_weight(0, 1.0, 80) == pytest.approx(math.exp(-5), rel=1e-15)
    assert rampup_weight(40, 1.0, 80) == pytest.approx(math.exp(-1.25), rel=1e-15)
    assert rampup_weight(60, 2.5, 80) == pytest.approx(2.5 * math.exp(-5 / 16), rel=1e-15)
    assert [rampup_weight(e, 0.3, 80) for e in (80, 81, 299)] == [0.3, 0.3, 0.3]
    assert [rampup_weight(e, 0.3, 0) for e in (0, 1, 5)] == [0.3, 0.3, 0.3]
    assert rampup_weight(40, 0.0, 80) == 0


def test_the_weight_is_of_both_distillation_losses_and_of_nothing_else() -> None:
    """Eqs. 3, 5, 6: the cross-entropies are not weighted."""
    z, z_t, q = noise(3, 2, 5), noise(2, 5), noise(3, 2, 5)
    once, thrice = (terms_of(PclConfig(), z, z_t, q, weight) for weight in (1.0, 3.0))
    ratios = [thrice[name].item() / once[name].item() for name in once]
    assert ratios == pytest.approx([1.0] * 4 + [3.0] * 6, rel=1e-12)


@pytest.mark.parametrize(("epochs", "alpha"), [(300, 80.0), (90, 24.0), (10, 2.666667)])
def test_the_rampup_keeps_its_share_of_a_run_of_other_length(epochs: int, alpha: float) -> None:
    """Section 3: alpha is 80 of 300 epochs and keeps that share unless it is given."""
    config = Config(device="cpu", train=TrainConfig(epochs=epochs))
    assert resolve(config).pcl.rampup_epochs == pytest.approx(alpha, abs=1e-6)
    given = Config(device="cpu", train=TrainConfig(epochs=epochs), pcl=PclConfig(rampup_epochs=7.0))
    assert resolve(given).pcl.rampup_epochs == 7.0


def test_the_ensemble_teacher_is_not_moved_by_what_it_teaches() -> None:
    """Section 3, detach_ensemble: only its own cross-entropy reaches z_t."""
    z, z_t = noise(3, 2, 5), noise(2, 5).requires_grad_()
    terms = terms_of(PclConfig(), z, z_t, z, weight=1.0)
    (gradient,) = torch.autograd.grad(torch.stack(list(terms.values())).sum(), z_t)
    one_hot = np.eye(2, 5)
    np.testing.assert_allclose(gradient.numpy(), (softened(as_numpy(z_t), 1.0) - one_hot) / 2, rtol=1e-12)


def test_without_detaching_the_ensemble_teacher_learns_from_its_peers() -> None:
    """detach_ensemble off: d(T^2 KL(p_t||p_j))/dz_t = T p_t (log p_t - log p_j - KL) / B is added."""
    z, z_t = noise(1, 1, 5), noise(1, 5).requires_grad_()
    options = PclConfig(num_peers=1, detach_ensemble=False)
    terms = terms_of(options, z, z_t, z, weight=1.0)
    (gradient,) = torch.autograd.grad(terms["pe/peer1"], z_t)
    p_t, p_j = softened(as_numpy(z_t), 3.0)[0], softened(as_numpy(z[0]), 3.0)[0]
    log_ratio = np.log(p_t / p_j)
    expected = 3.0 * p_t * (log_ratio - sum(p_t * log_ratio))
    np.testing.assert_allclose(gradient[0].numpy(), expected, rtol=1e-9, atol=1e-12)


def test_no_gradient_reaches_the_mean_teachers() -> None:
    """Section 4: mean teachers only teach."""
    z, q = noise(3, 2, 5).requires_grad_(), noise(3, 2, 5).requires_grad_()
    torch.stack(list(terms_of(PclConfig(), z, z[0], q, weight=1.0).values())).sum().backward()
    assert z.grad is not None
    assert q.grad is None
    assert not any(parameter.requires_grad for parameter in teacher_of(tiny_state()).parameters())


def test_losses_of_half_precision_logits_are_computed_in_float32() -> None:
    """Section 3: softmaxes, KL and losses in float32 under AMP, to the bit."""
    z, z_t, q = (noise(*shape).bfloat16() for shape in ((3, 4, 6), (4, 6), (3, 4, 6)))
    half = terms_of(PclConfig(), z, z_t, q, weight=1.0)
    full = terms_of(PclConfig(), z.float(), z_t.float(), q.float(), weight=1.0)
    assert {value.dtype for value in half.values()} == {torch.float32}
    assert equal(half, full)


@pytest.mark.parametrize(
    ("options", "kinds"),
    [
        ({}, {"ce", "pe", "pm"}),
        ({"ensemble_teacher": False}, {"ce", "pm"}),
        ({"mean_teacher": False}, {"ce", "pe"}),
        ({"ensemble_teacher": False, "mean_teacher": False}, {"ce"}),
    ],
)
def test_an_ablation_leaves_out_its_term_and_no_other(options: dict[str, Any], kinds: set[str]) -> None:
    """Table 4: without the ensemble teacher, without the mean teachers."""
    z, z_t, q = noise(3, 2, 5), noise(2, 5), noise(3, 2, 5)
    whole, found = terms_of(PclConfig(), z, z_t, q, 0.5), terms_of(PclConfig(**options), z, z_t, q, 0.5)
    assert {name.split("/")[0] for name in found} == kinds
    assert "ce/ensemble" in found
    assert all(torch.equal(found[name], whole[name]) for name in found)


@pytest.mark.parametrize("m", [2, 3, 8])
def test_plain_mutual_learning_has_peers_in_the_place_of_their_averages(m: int) -> None:
    """Eq. 5 with p_k for q_k, as constants: no gradient reaches the peer that teaches."""
    z, z_t, q = noise(m, 4, 6).requires_grad_(), noise(4, 6), noise(m, 4, 6)
    found = terms_of(PclConfig(num_peers=m, mutual_learning=True), z, z_t, q, weight=0.25)
    usual = terms_of(PclConfig(num_peers=m), z, z_t, z.detach(), weight=0.25)
    assert [name.replace("ml/", "pm/") for name in found] == list(usual)
    assert list(found) != list(usual)
    for ours, theirs in zip(found.values(), usual.values(), strict=True):
        assert torch.equal(ours, theirs)
    (ours,) = torch.autograd.grad(found["ml/peer1"], z)
    assert ours[0].abs().max() > 0
    assert not ours[1:].any()


@pytest.mark.parametrize("m", range(1, 9))
def test_any_number_of_peers_from_one_to_eight_trains(m: int) -> None:
    """m = 1 has nobody else to learn from: L_pm is absent, not 0/0."""
    state = tiny_state(num_peers=m)
    metrics = train(state, make_batches(2, views=m))[-1]
    assert len(metrics.terms) == (3 * m + 1 if m > 1 else 3)
    assert metrics.terms.isfinite().all()
    state.guard.check()
    assert all(parameter.isfinite().all() for parameter in teacher_of(state).parameters())


# 4. Peer mean teacher


def test_the_ema_coefficient_rises_from_nought_to_its_ceiling() -> None:
    """Eq. 4: phi(g) = min(1 - 1/g, 0.999), g = 1, 2, ..."""
    assert [ema_coefficient(g, 0.999) for g in (1, 2, 3, 4, 10)] == [0, 1 / 2, 1 - 1 / 3, 3 / 4, 0.9]
    assert [ema_coefficient(g, 0.999) for g in (1000, 1001, 10**6)] == [0.999] * 3
    with pytest.raises(AssertionError):
        ema_coefficient(0, 0.999)


def test_the_first_step_copies_the_student_as_the_optimizer_left_it() -> None:
    """Eq. 4 with phi(1) = 0, after the optimizer's step: equal to the bit, and to the moved student."""
    state = tiny_state()
    before = parameters(state.network)
    train(state, make_batches(1))
    assert equal(parameters(teacher_of(state)), parameters(state.network))
    assert not equal(parameters(teacher_of(state)), before)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_parameter_is_averaged_after_every_step_of_the_optimizer(dtype: str) -> None:
    """Eq. 4: theta_ema = phi theta_ema + (1 - phi) theta, in float32 also under AMP, classifiers included."""
    state = tiny_state(dtype)
    averages = {name: as_numpy(value) for name, value in parameters(state.network).items()}
    for g, batch in enumerate(make_batches(6), start=1):
        train_step(state, batch, moment(g))
        phi = min(1 - 1 / g, DECAY)
        for name, theta in parameters(state.network).items():
            averages[name] = phi * averages[name] + (1 - phi) * as_numpy(theta)
    found = parameters(teacher_of(state))
    assert {name.split(".")[0] for name in found} == {"trunk", "branches", "classifiers", "ensemble"}
    for name, value in found.items():
        assert value.dtype == torch.float32
        np.testing.assert_allclose(value.numpy(), averages[name], rtol=1e-5, atol=1e-6)
        assert not torch.equal(value, state.network.get_parameter(name)), f"{name} is the student's"


def test_a_step_of_a_thousandth_moves_the_average_under_amp() -> None:
    """Section 3: 1 + 1e-3 is 1 in bfloat16; the average must move nevertheless."""
    state = tiny_state("bfloat16")
    assert state.mean_teacher is not None
    assert isinstance(state.network.ensemble, torch.nn.Linear)
    average = teacher_of(state).get_parameter("ensemble.bias")
    with torch.no_grad():
        average.fill_(1)
        state.network.ensemble.bias.fill_(2)
    phi = torch.tensor(0.999, dtype=torch.float64)
    state.arena.update(torch.zeros_like(phi), phi, stop=torch.zeros(()))
    np.testing.assert_allclose(average.numpy(), 1.001, rtol=2e-7)


def test_own_batch_norm_runs_the_mean_teacher_on_its_own_batches() -> None:
    """Section 4, ema_bn=own: train mode, statistics of its own forward passes and nobody else's."""
    state = tiny_state(ema_bn="own")
    *first, last = make_batches(3)
    train(state, first)
    expected = copy.deepcopy(teacher_of(state))
    assert expected.training
    expected(last.views_VBCHW)
    train(state, [last], first_step=3)
    assert equal(buffers(teacher_of(state)), buffers(expected))
    assert not equal(buffers(teacher_of(state)), buffers(state.network))


def test_copied_batch_norm_is_the_students() -> None:
    """Section 4, ema_bn=copy: the student's running statistics as they are, used in eval mode."""
    state = tiny_state(ema_bn="copy")
    train(state, make_batches(3))
    assert not teacher_of(state).training
    assert equal(buffers(teacher_of(state)), buffers(state.network))


def test_averaged_batch_norm_follows_like_the_parameters() -> None:
    """Section 4, ema_bn=ema: the running statistics are averaged with the same phi; counts are copied."""
    state = tiny_state(ema_bn="ema")
    averages = {name: as_numpy(value) for name, value in buffers(teacher_of(state)).items()}
    for g, batch in enumerate(make_batches(4), start=1):
        train_step(state, batch, moment(g))
        phi = min(1 - 1 / g, DECAY)
        for name, value in buffers(state.network).items():
            kept = 0.0 if name.endswith("num_batches_tracked") else phi
            averages[name] = kept * averages[name] + (1 - kept) * as_numpy(value)
    assert not teacher_of(state).training
    for name, value in buffers(teacher_of(state)).items():
        np.testing.assert_allclose(as_numpy(value), averages[name], rtol=1e-5, atol=1e-6)


# 5. What is deployed and reported


def test_the_deployed_network_is_the_first_peers_mean_teacher_to_the_bit() -> None:
    """Section 3.4, PCL: a plain network, at the plain network's cost."""
    state = tiny_state()
    train(state, make_batches(3))
    plain = find_backbone("resnet8").build(CLASSES).eval()
    plain.load_state_dict(state.deployed_tensors(), strict=True)
    images = torch.randn(5, 3, SIZE, SIZE)
    out = teacher_of(state).eval()(images[None])
    assert torch.equal(plain(images), out.logits_VBC[0])
    assert not torch.equal(plain(images), state.network.eval()(images[None]).logits_VBC[0])


def test_pcl_and_pcl_e_are_reported_from_the_mean_teachers() -> None:
    """Section 3.4: PCL is mean teacher 1, PCL-E the EMA ensemble classifier over the m EMA branches."""
    state = tiny_state()
    train(state, make_batches(5))
    exam = SyntheticEvalLoader(
        SyntheticOptions(
            num_samples=64,
            num_classes=CLASSES,
            image_size=SIZE,
            batch_size=64,
            seed=2,
            device=torch.device("cpu"),
        )
    )
    heads = evaluate_state(state, exam)
    network, images = teacher_of(state).eval(), exam.images_BCHW
    features = [branch(network.trunk(images)) for branch in network.branches]
    assert isinstance(network.ensemble, torch.nn.Linear)
    logits = {
        "PCL": network.classifiers[0](features[0]),
        "PCL-E": torch.cat(features, 1) @ network.ensemble.weight.T + network.ensemble.bias,
    }
    assert state.objective.headline.keys() == logits.keys()
    for name, head in state.objective.headline.items():
        expected = cross_entropy(as_numpy(logits[name]), exam.labels_B.tolist())
        assert heads[head].loss == pytest.approx(expected, rel=1e-5)
        assert heads[head].top1 == 100 * (logits[name].argmax(1) == exam.labels_B).double().mean().item()


# 6. Recipes


def test_the_optimizer_is_sgd_with_nesterovs_momentum_and_weight_decay_on_everything() -> None:
    """Section 4.1: d = g + 5e-4 theta; v = 0.9 v + d; theta = theta - lr (d + 0.9 v)."""
    state = tiny_state()
    theta = {name: as_numpy(value) for name, value in parameters(state.network).items()}
    v = {name: np.zeros_like(value) for name, value in theta.items()}
    for step, batch in enumerate(make_batches(3), start=1):
        train_step(state, batch, moment(step))
        for name, parameter in state.network.named_parameters():
            assert parameter.grad is not None
            d = as_numpy(parameter.grad) + 5e-4 * theta[name]
            v[name] = 0.9 * v[name] + d
            theta[name] = theta[name] - 0.05 * (d + 0.9 * v[name])
    for name, value in parameters(state.network).items():
        np.testing.assert_allclose(value.numpy(), theta[name], rtol=1e-5, atol=2e-6)


def test_the_cifar_recipe_is_the_papers() -> None:
    """Section 4.1: lr 0.1, x0.1 at epochs 150 and 225 of 300, batch 128, weight decay 5e-4."""
    config = find_preset("cifar100-resnet32").config
    optim = config.optim
    rates = [learning_rate(optim.lr, e, 300, optim.milestones, optim.gamma) for e in range(300)]
    assert config.train.epochs == 300
    assert rates == pytest.approx([0.1] * 150 + [0.01] * 75 + [0.001] * 75, rel=1e-12)
    assert (config.train.batch_size, optim.weight_decay) == (128, 5e-4)
    assert (optim.momentum, optim.nesterov) == (0.9, True)
    assert (config.pcl.num_peers, config.pcl.temperature, config.pcl.ema_decay) == (3, 3.0, 0.999)


def test_the_imagenet_recipe_is_the_usual_one() -> None:
    """Section 6: lr 0.1 for a batch of 256, x0.1 at 30 and 60 of 90, weight decay 1e-4, alpha 20 of 90."""
    config = find_preset("imagenet-r18").config
    optim = config.optim
    rates = [learning_rate(optim.lr, e, 90, optim.milestones, optim.gamma) for e in range(90)]
    assert config.train.epochs == 90
    assert rates == pytest.approx([0.1] * 30 + [0.01] * 30 + [0.001] * 30, rel=1e-12)
    assert (config.train.batch_size, optim.weight_decay) == (256, 1e-4)
    assert (optim.momentum, optim.nesterov) == (0.9, True)
    assert resolve(Config(device="cpu", train=config.train, pcl=config.pcl)).pcl.rampup_epochs == 20.0
