"""Peers of different backbones, and a run that begins with another one's network, on two ranks."""

from pathlib import Path

import torch

from pcl_fast.dist import ALONE, World, joined
from tests.dist.parts import CPU, config_of
from tests.dist.ranks import run_ranks
from tests.dist.runs import train_rank
from tests.dist.test_exactness import Course, course
from tests.tiny import read_model


def course_of(world: World) -> Course:
    """In float64, with BatchNorm over all ranks."""
    return course("sync-own", world, model="resnet8,resnet20,resnet8")


def joined_course() -> Course:
    """On a rank."""
    with joined(CPU, 60) as world:
        return course_of(world)


def test_two_ranks_do_what_one_process_does(tmp_path: Path) -> None:
    expected, (found, other) = course_of(ALONE), run_ranks(tmp_path, 2, joined_course)
    assert found.digests_G == other.digests_G
    assert expected.state.keys() == found.state.keys()
    for entry, tensor in expected.state.items():
        largest = tensor.double().abs().max().item()
        torch.testing.assert_close(found.state[entry], tensor, rtol=0, atol=1e-10 * largest, msg=entry)


def test_both_ranks_begin_with_what_the_first_has_read(tmp_path: Path) -> None:
    """At a rate of next to nothing the product is what the run began with."""
    first = config_of(2)
    run_ranks(tmp_path / "a", 2, train_rank, [tmp_path / "first", first])
    left = read_model(tmp_path / "first" / "model.safetensors")["tensors"]
    config = config_of(2, init=tmp_path / "first", optim={"lr": 1e-30, "weight_decay": 0.0})
    ranks = run_ranks(tmp_path / "b", 2, train_rank, [tmp_path / "second", config])
    assert ranks[0] == ranks[1]
    found = read_model(tmp_path / "second" / "model.safetensors")["tensors"]
    learned = [key for key in left if "running" not in key and "tracked" not in key]
    for key in learned:
        torch.testing.assert_close(found[key], left[key], rtol=1e-6, atol=0)
