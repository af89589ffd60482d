"""Saving and going on equals never having stopped, to the bit."""

import dataclasses
import io
from typing import Any

import pytest
import torch

from pcl_fast.build import build_network, build_state
from pcl_fast.models.zoo import find_backbone
from pcl_fast.objectives import make_objective
from pcl_fast.step.state import TrainState, random_state, restore_random_state
from tests.step.tiny import CLASSES, buffers, equal, make_batches, parameters, tiny_config, tiny_state, train


def through_a_file(state: TrainState) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state.state_dict(), file)
    file.seek(0)
    return torch.load(file, map_location="cpu", weights_only=True)


def assert_equal_states(one: TrainState, other: TrainState) -> None:
    assert one.mean_teacher is not None
    assert other.mean_teacher is not None
    pairs = ((one.network, other.network), (one.mean_teacher.network, other.mean_teacher.network))
    for mine, theirs in pairs:
        assert equal(parameters(mine), parameters(theirs))
        assert equal(buffers(mine), buffers(theirs))
    assert equal(dict(one.arena.momentum), dict(other.arena.momentum))


@pytest.mark.parametrize("ema_bn", ["own", "copy", "ema"])
def test_three_steps_a_file_and_three_steps_are_six_steps(ema_bn: str) -> None:
    batches = make_batches(6)
    straight, stopped = tiny_state(ema_bn=ema_bn), tiny_state(ema_bn=ema_bn)
    expected = train(straight, batches)
    train(stopped, batches[:3])
    resumed = tiny_state(ema_bn=ema_bn)
    train(resumed, make_batches(2, seed=9))  # whatever it was before
    resumed.load_state_dict(through_a_file(stopped))
    found = train(resumed, batches[3:], first_step=4)
    assert_equal_states(resumed, straight)
    for mine, theirs in zip(found, expected[3:], strict=True):
        assert torch.equal(mine.terms, theirs.terms)
        assert torch.equal(mine.gradient_norm, theirs.gradient_norm)
        assert torch.equal(mine.correct, theirs.correct)


def test_random_numbers_go_on_where_they_were() -> None:
    """A network with dropout draws from torch's generator."""
    cpu = torch.device("cpu")
    saved = random_state(cpu)
    expected = torch.rand(5)
    restore_random_state(saved, cpu)
    assert torch.equal(torch.rand(5), expected)


def test_weights_are_drawn_from_the_seed_alone() -> None:
    first = parameters(tiny_state().network)
    torch.rand(3)
    assert equal(parameters(tiny_state().network), first)


def test_building_the_network_leaves_the_callers_random_state() -> None:
    config = tiny_config()
    before = torch.get_rng_state()
    build_network(config, make_objective(config))
    assert torch.equal(torch.get_rng_state(), before)


def test_vanilla_deploys_the_student_and_has_no_mean_teacher() -> None:
    state = build_state(dataclasses.replace(tiny_config(), method="vanilla"))
    assert state.mean_teacher is None
    assert state.network.ensemble is None
    train(state, make_batches(2, views=1))
    plain = find_backbone("resnet8").build(CLASSES).eval()
    plain.load_state_dict(state.deployed_tensors(), strict=True)
    images = torch.randn(3, 3, 8, 8)
    assert torch.equal(plain(images), state.network.eval()(images[None]).logits_VBC[0])
    fresh = build_state(dataclasses.replace(tiny_config(), method="vanilla"))
    fresh.load_state_dict(through_a_file(state))
    assert equal(parameters(fresh.network), parameters(state.network))
