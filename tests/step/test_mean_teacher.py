"""The averaging itself: exact at its two ends, and of nothing but what it should."""

from typing import Any

import pytest
import torch
from torch import nn

from pcl_fast.kernels.sgd_ema import SgdRule
from pcl_fast.models.peers import PeerNetwork
from pcl_fast.models.zoo import find_backbone
from pcl_fast.step.arena import Arena
from pcl_fast.step.mean_teacher import MeanTeacher
from tests.step.tiny import CLASSES, SIZE, buffers, equal, parameters


def make_student() -> PeerNetwork:
    """A network whose running statistics have left their first values."""
    network = PeerNetwork(find_backbone("resnet8"), CLASSES, num_peers=2)
    network(torch.randn(2, 3, 3, SIZE, SIZE))
    return network


def scatter(network: nn.Module) -> None:
    """Other values for every parameter and running statistic."""
    with torch.no_grad():
        for value in [*network.parameters(), *network.buffers()]:
            value.copy_(torch.randn(value.shape).abs() * 10)


def phi(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def follow(student: PeerNetwork, teacher: MeanTeacher, phi: torch.Tensor) -> None:
    """What a step does about its mean teacher, with a learning rate of nought."""
    averages = parameters(teacher.network)
    arena = Arena(student, teacher.network, SgdRule(momentum=0.9, weight_decay=5e-4, nesterov=True))
    assert equal(parameters(teacher.network), averages)
    arena.update(torch.zeros_like(phi), phi, stop=torch.zeros(()))
    teacher.follow_statistics(student, phi)


@pytest.mark.parametrize("ema_bn", ["own", "copy", "ema"])
def test_nought_copies_the_student_and_one_changes_nothing(ema_bn: Any) -> None:
    student = make_student()
    teacher = MeanTeacher(student, ema_bn)
    scatter(teacher.network)
    before, statistics = parameters(teacher.network), buffers(teacher.network)
    follow(student, teacher, phi(1.0))
    assert equal(parameters(teacher.network), before)
    expected = {"own": statistics, "copy": buffers(student), "ema": statistics}[ema_bn]
    found = buffers(teacher.network)
    counts = [name for name in found if name.endswith("num_batches_tracked")]
    if ema_bn == "ema":  # counts are not averaged but copied
        expected = expected | {name: buffers(student)[name] for name in counts}
    assert equal(found, expected)
    follow(student, teacher, phi(0.0))
    assert equal(parameters(teacher.network), parameters(student))
    assert equal(buffers(teacher.network), statistics if ema_bn == "own" else buffers(student))


def test_an_average_of_equal_weights_stays_where_it_is() -> None:
    """phi and 1 - phi must sum to one in float32, or weights would shrink or grow by themselves."""
    student = make_student()
    teacher = MeanTeacher(student, "own")
    for _ in range(100):
        follow(student, teacher, phi(0.999))
    for name, value in parameters(student).items():
        torch.testing.assert_close(teacher.network.get_parameter(name), value, rtol=1e-5, atol=1e-7)


def test_the_mean_teacher_shares_no_memory_with_the_student() -> None:
    student = make_student()
    teacher = MeanTeacher(student, "own").network
    mine = {value.data_ptr() for value in [*teacher.parameters(), *teacher.buffers()]}
    theirs = {value.data_ptr() for value in [*student.parameters(), *student.buffers()]}
    assert mine.isdisjoint(theirs)
    assert {parameter.requires_grad for parameter in teacher.parameters()} == {False}
    assert {parameter.requires_grad for parameter in student.parameters()} == {True}


@pytest.mark.parametrize(("ema_bn", "training"), [("own", True), ("copy", False), ("ema", False)])
def test_it_teaches_in_its_mode_again_after_an_evaluation(ema_bn: Any, training: bool) -> None:
    teacher = MeanTeacher(make_student(), ema_bn)
    assert {module.training for module in teacher.network.modules()} == {training}
    teacher.network.train(not training)
    teacher.learning_mode()
    assert {module.training for module in teacher.network.modules()} == {training}
