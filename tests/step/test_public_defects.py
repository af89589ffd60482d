"""What public implementations of PCL and its kin get wrong, one test a defect; each would fail with it."""

import io
import itertools
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

from pcl_fast.commands.compare import report_run
from pcl_fast.config import PclConfig
from pcl_fast.config_file import to_dict
from pcl_fast.contract import EvalBatch, OpenData
from pcl_fast.models.peers import PeerNetwork
from pcl_fast.models.zoo import OURS, find_backbone
from pcl_fast.run_folder import RunFolder
from pcl_fast.sinks import JsonlSink
from pcl_fast.step.train_step import train_step
from pcl_fast.trainer import Trainer
from tests.objectives.oracles import as_numpy, kl, noise, of_kind, terms_of
from tests.step.tiny import (
    CLASSES,
    DECAY,
    SIZE,
    equal,
    make_batches,
    moment,
    parameters,
    tiny_config,
    tiny_state,
    tiny_trainer,
)

CIFAR_BACKBONES = [name for name, backbone in OURS.items() if backbone.family == "cifar"]


def test_the_rampup_divides_the_epoch_by_alpha_not_by_lambda(tmp_path: Path) -> None:
    """Over lambda, the weight would be full (or nought) long before alpha; here alpha 4, lambda 1.5."""
    trainer, notes = tiny_trainer(tiny_config(rampup_epochs=4.0, distill_weight=1.5), tmp_path, 1)
    trainer.run()
    weights = [record["distill_weight"] for record in notes.records if record["kind"] == "step"]
    expected = [1.5 * math.exp(-5 * (1 - e / 4) ** 2) for e in range(4)] + [1.5, 1.5]
    assert weights == pytest.approx(expected, rel=1e-12)


def test_the_ema_coefficient_of_every_step_is_that_of_its_number(tmp_path: Path) -> None:
    """Called with step 0 for ever, the mean teacher would be the student."""
    trainer, notes = tiny_trainer(tiny_config(), tmp_path, 1)
    trainer.run()
    steps = [record for record in notes.records if record["kind"] == "step"]
    assert [record["step"] for record in steps] == [1, 2, 3, 4, 5, 6]
    found = [record["ema_coefficient"] for record in steps]
    assert found == pytest.approx([0, 1 / 2, 2 / 3, 3 / 4, 3 / 4, 3 / 4], rel=1e-12)
    assert equal(notes.teachers[0], notes.students[0])
    assert not equal(notes.teachers[5], notes.students[5])


def test_the_mean_teacher_moves_at_every_step_not_once_an_epoch(tmp_path: Path) -> None:
    """Three steps an epoch: after each, it is the average of all students so far."""
    trainer, notes = tiny_trainer(tiny_config(), tmp_path, 3)
    trainer.run()
    assert len(notes.teachers) == 18
    averages = {name: torch.zeros_like(value) for name, value in notes.students[0].items()}
    for g, (student, teacher) in enumerate(zip(notes.students, notes.teachers, strict=True), start=1):
        phi = min(1 - 1 / g, DECAY)
        for name, theta in student.items():
            averages[name] = phi * averages[name] + (1 - phi) * theta
            torch.testing.assert_close(teacher[name], averages[name], rtol=1e-4, atol=1e-5)
    assert not any(equal(*pair) for pair in itertools.pairwise(notes.teachers))


@pytest.mark.parametrize("m", [2, 3, 5, 8])
def test_the_mean_teachers_weigh_the_same_however_many_they_are(m: int) -> None:
    """Without 1/(m-1), a peer taught alike by all would be taught m - 1 times as much."""
    z, q = noise(1, 2, 5), noise(1, 2, 5)
    found = terms_of(PclConfig(num_peers=m), z.expand(m, 2, 5), z[0], q.expand(m, 2, 5), weight=1.0)
    once = 9 * kl(as_numpy(q[0]), as_numpy(z[0]), 3.0)
    assert of_kind("pm", found) == pytest.approx([once] * m, rel=1e-9)


class Exam:
    """Labels that mean teacher 1 has all right until the last epoch, and all wrong after it."""

    num_samples = 40
    trainer: Trainer

    def __iter__(self) -> Iterator[EvalBatch]:
        images = torch.randn(40, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(3))
        plain = find_backbone("resnet8").build(CLASSES).eval()
        plain.load_state_dict(self.trainer.state.deployed_tensors())
        last = self.trainer.progress.epochs_closed + 1 == self.trainer.config.train.epochs
        answers = plain(images).detach().argmax(1)
        yield EvalBatch(images, (answers + 1) % CLASSES if last else answers)


def test_the_last_epochs_first_peer_is_reported_not_the_best_of_all(tmp_path: Path) -> None:
    """Reported is mean teacher 1 after the last epoch, whatever an earlier epoch or another peer reached."""
    config, exam = tiny_config(), Exam()
    folder = RunFolder(tmp_path)
    donor, _ = tiny_trainer(config, tmp_path)
    exam.trainer = Trainer(config, OpenData(donor.data.train, exam), folder, [JsonlSink(folder.metrics)])
    folder.claim(config).close()
    reached = exam.trainer.run()
    assert reached["mean_teacher1"]["top1"] == 0
    assert max(accuracy["top1"] for accuracy in reached.values()) > 0
    printed = io.StringIO()
    report_run(folder, Console(file=printed))
    assert folder.read_config().method == to_dict(config)["method"] == "pcl"
    assert "epoch 6: PCL 0.00%" in printed.getvalue()


@pytest.mark.parametrize("name", CIFAR_BACKBONES)
def test_no_branch_shares_a_layer_with_another(name: str) -> None:
    """DenseNet's last dense block included: what peer 2 alone is taught reaches no layer of peer 1."""
    with torch.device("meta"):  # which gradients exist depends on no value
        network = PeerNetwork(find_backbone(name), CLASSES, num_peers=2)
        _, second_map = network.run_trunk(torch.empty(2, 2, 3, 32, 32))
        network.classifiers[1](network.branches[1](second_map)).sum().backward()
    first, second = (nn.ModuleList(peer) for peer in zip(network.branches, network.classifiers, strict=True))
    assert {id(tensor) for tensor in first.parameters()}.isdisjoint(map(id, second.parameters()))
    assert {id(layer) for layer in first.modules()}.isdisjoint(map(id, second.modules()))
    assert [parameter for parameter in first.parameters() if parameter.grad is not None] == []
    assert all(parameter.grad is not None for parameter in second.parameters())
    assert all(parameter.grad is not None for parameter in network.trunk.parameters())


def test_training_a_densenet_branch_leaves_the_others() -> None:
    network = PeerNetwork(find_backbone("densenet40_12"), CLASSES)
    before = [parameters(branch) for branch in network.branches]
    statistics = [branch.get_buffer("norm.running_mean").clone() for branch in network.branches]
    images = torch.randn(2, 3, SIZE, SIZE)
    network.classifiers[1](network.branches[1](network.trunk(images.repeat(3, 1, 1, 1)))).sum().backward()
    torch.optim.SGD(network.parameters(), 0.1, weight_decay=0.1).step()
    same = [equal(parameters(branch), old) for branch, old in zip(network.branches, before, strict=True)]
    assert same == [True, False, True]
    untouched = [
        torch.equal(branch.get_buffer("norm.running_mean"), old)
        for branch, old in zip(network.branches, statistics, strict=True)
    ]
    assert untouched == [True, False, True]


def test_soft_targets_are_detached() -> None:
    """Neither L_pe nor L_pm moves its teacher: not z_t, and not q."""
    z, z_t, q = (noise(*shape).requires_grad_() for shape in ((3, 2, 5), (2, 5), (3, 2, 5)))
    terms = terms_of(PclConfig(), z, z_t, q, weight=1.0)
    distillation = torch.stack([value for name, value in terms.items() if not name.startswith("ce")])
    gradients = torch.autograd.grad(distillation.sum(), [z, z_t, q], allow_unused=True)
    moved = [gradient is not None and bool(gradient.any()) for gradient in gradients]
    assert moved == [True, False, False]


def test_the_ensemble_classifier_learns_from_its_own_cross_entropy_alone() -> None:
    """In a whole step: its gradient is the one without any distillation."""
    (batch,) = make_batches(1)
    gradients = []
    for weight in (0.0, 1.0):
        state = tiny_state()
        train_step(state, batch, moment(1, distill_weight=weight))
        assert state.network.ensemble is not None
        gradients.append(state.network.ensemble.weight.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)


def test_every_parameter_follows_the_learning_rate() -> None:
    """A part with an optimizer of its own (a fusion module, say) must not be left behind: there are none."""
    state = tiny_state()
    weights = [*state.network.parameters(), *state.arena.momentum.values()]
    held = {weight.untyped_storage().data_ptr() for weight in state.network.parameters()}
    assert held == {state.arena.buffers.values.untyped_storage().data_ptr()}
    assert len(weights) == 2 * len({id(weight) for weight in state.network.parameters()})
    before = parameters(state.network)
    train_step(state, make_batches(1)[0], moment(1, lr=0.0))
    assert equal(parameters(state.network), before)
    train_step(state, make_batches(1)[0], moment(2, lr=0.01))
    moved = parameters(state.network)
    assert [name for name in moved if torch.equal(moved[name], before[name])] == []


def test_the_learning_rate_falls_in_the_run_itself(tmp_path: Path) -> None:
    """Milestones at 0.5 and 0.75 of six epochs: from epochs 3 and 5 on."""
    trainer, notes = tiny_trainer(tiny_config(), tmp_path, 1)
    trainer.run()
    rates = [record["lr"] for record in notes.records if record["kind"] == "step"]
    assert rates == pytest.approx([0.1, 0.1, 0.1, 0.01, 0.01, 0.001], rel=1e-12)
    steps = [torch.tensor(step) for step in range(1, 7)]
    on_device = [float(trainer.timetable.on_device(step).lr) for step in steps]
    assert on_device == rates
