"""Copies of the weights in half precision: always those weights, rounded, and read as autocast would."""

import copy
import dataclasses
from typing import Any

import torch
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from pcl_fast import build
from pcl_fast.kernels.sgd_ema import SgdRule
from pcl_fast.models.peers import PeerNetwork
from pcl_fast.models.zoo import find_backbone
from pcl_fast.step.arena import Arena
from pcl_fast.step.mean_teacher import MeanTeacher
from pcl_fast.step.state import TrainState
from pcl_fast.step.train_step import train_step
from tests.step.tiny import CLASSES, equal, make_batches, moment, parameters, tiny_config, train

RULE = SgdRule(momentum=0.9, weight_decay=5e-3, nesterov=True)


def make_network() -> PeerNetwork:
    network = PeerNetwork(find_backbone("resnet8"), CLASSES, num_peers=2)
    return network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def plain_state() -> TrainState:
    """A state on the CPU, where autocast casts the weights."""
    config = tiny_config("bfloat16", num_peers=2)
    return build.build_state(dataclasses.replace(config, kernels="off"))


def half_state() -> TrainState:
    """The same with copies of the weights that forwards read, as on a GPU."""
    state = plain_state()
    teacher = state.mean_teacher
    assert teacher is not None
    state.arena = Arena(state.network, teacher.network, state.arena.rule, torch.bfloat16)
    forward = build._forward
    state.student_forward = forward(state.network, state.arena.student_half, False, print)
    state.teacher_forward = forward(teacher.network, state.arena.teacher_half, False, print)
    return state


class Casts(TorchDispatchMode):
    """Where the tensors lie of which bfloat16 copies are made."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket is torch.ops.aten._to_copy and out.dtype == torch.bfloat16:
            self.addresses.add(args[0].data_ptr())
        return out


def test_what_autocast_casts_has_a_half_copy_and_nothing_else_has() -> None:
    network = make_network()
    with torch.autocast("cpu", torch.bfloat16), Casts() as casts:
        network(torch.randn(2, 4, 3, 16, 16))
    cast = {name for name, weight in network.named_parameters() if weight.data_ptr() in casts.addresses}
    arena = Arena(network, MeanTeacher(network, "own").network, RULE, torch.bfloat16)
    assert arena.student_half.keys() == arena.teacher_half.keys() == cast
    assert {half.requires_grad for half in arena.student_half.values()} == {True}
    assert {half.requires_grad for half in arena.teacher_half.values()} == {False}


def assert_halves_are_rounded_weights(state: TrainState) -> None:
    assert state.mean_teacher is not None
    teacher = state.mean_teacher.network
    for network, halves in ((state.network, state.arena.student_half), (teacher, state.arena.teacher_half)):
        whole = parameters(network)
        for name, half in halves.items():
            assert torch.equal(half, whole[name].bfloat16()), name


def test_half_copies_of_averages_are_those_of_averages_from_the_start() -> None:
    """Also of a mean teacher that is not its student's twin."""
    network = make_network()
    teacher = MeanTeacher(network, "own").network
    with torch.no_grad():
        for average in teacher.parameters():
            average.add_(1)
    arena = Arena(network, teacher, RULE, torch.bfloat16)
    for name, half in arena.teacher_half.items():
        assert torch.equal(half, teacher.get_parameter(name).bfloat16()), name


def test_half_copies_follow_every_update_and_every_load() -> None:
    state = half_state()
    assert_halves_are_rounded_weights(state)
    start = state.arena.student_half["ensemble.weight"].clone()
    train(state, make_batches(3, views=2))
    assert_halves_are_rounded_weights(state)
    assert not torch.equal(state.arena.student_half["ensemble.weight"], start)
    other = half_state()
    train(other, make_batches(1, views=2, seed=8))
    other.load_state_dict(state.state_dict())
    assert_halves_are_rounded_weights(other)
    assert equal(dict(other.arena.student_half), dict(state.arena.student_half))


def test_a_forward_with_half_copies_is_autocasts() -> None:
    """To the bit, and so are its gradients."""
    network = make_network()
    twin = copy.deepcopy(network)
    arena = Arena(network, None, RULE, torch.bfloat16)
    views = torch.randn(2, 4, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        plain = twin(views)
        ours = functional_call(network, arena.student_half, (views.bfloat16(),))
    assert ours.logits_VBC.dtype == torch.bfloat16
    assert torch.equal(ours.logits_VBC, plain.logits_VBC)
    assert torch.equal(ours.ensemble_logits_BC, plain.ensemble_logits_BC)
    assert equal(dict(network.named_buffers()), dict(twin.named_buffers()))
    loss, expected = (
        out.logits_VBC.float().square().sum() + out.ensemble_logits_BC.float().sin().sum()
        for out in (ours, plain)
    )
    arena.differentiate([loss], [None])
    expected.backward()
    for name, parameter in twin.named_parameters():
        found, wanted = network.get_parameter(name).grad, parameter.grad
        assert found is not None
        assert wanted is not None
        assert found.dtype == torch.float32
        assert torch.equal(found, wanted), name


def test_a_step_with_half_copies_is_autocasts() -> None:
    """A whole one: losses, weights and averages, to the bit."""
    ours, plain = half_state(), plain_state()
    for step, batch in enumerate(make_batches(3, views=2), start=1):
        found, expected = (train_step(state, batch, moment(step)) for state in (ours, plain))
        assert torch.equal(found.terms, expected.terms)
    for name in ("values", "momentum", "averages"):
        assert torch.equal(getattr(ours.arena.buffers, name), getattr(plain.arena.buffers, name)), name


def test_saved_tensors_are_ordinary_and_bring_everything_back() -> None:
    state = half_state()
    train(state, make_batches(2, views=2))
    saved = state.state_dict()
    tensors = [
        (f"{part} {name}", tensor)
        for part in ("network", "mean_teacher", "momentum")
        for name, tensor in saved[part].items()
    ]
    assert saved["network"].keys() == state.network.state_dict().keys()
    for name, tensor in tensors:
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size(), name
    storages = [tensor.untyped_storage().data_ptr() for _, tensor in tensors]
    assert len(set(storages)) == len(tensors), "two share memory"
    assert {buffer.data_ptr() for _, buffer in state.arena.buffers.named()}.isdisjoint(storages)
    fresh = half_state()
    addresses = {name: p.data_ptr() for name, p in fresh.network.named_parameters()}
    fresh.load_state_dict(saved)
    assert {name: p.data_ptr() for name, p in fresh.network.named_parameters()} == addresses
    for (name, ours), (_, theirs) in zip(
        fresh.arena.buffers.named(), state.arena.buffers.named(), strict=True
    ):
        assert name == "gradients" or torch.equal(ours, theirs), name
    assert equal(dict(fresh.network.named_buffers()), dict(state.network.named_buffers()))
