"""The rivals on two ranks: what one process does with the whole batch, and the same bits on both."""

import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from pcl_fast.dist import ALONE, World, joined
from tests.dist.parts import CPU, config_of
from tests.dist.ranks import run_ranks
from tests.dist.runs import train_rank
from tests.dist.test_exactness import Course, Courses, assert_close, course
from tests.dist.training import STEP, STEPS_PER_EPOCH, Fault, codes, get_signal, run, said, training
from tests.tiny import assert_same_run, newest_checkpoint

# A head with a norm of one pixel, one with two of maps, one without; gradients scaled at the split; views.
RIVALS: dict[str, dict[str, Any]] = {
    "dml": {"dml": {"num_peers": 2}},
    "cl": {"cl": {"num_heads": 2}},
    "one": {"one": {"num_peers": 2}},
    "okddip": {"okddip": {"num_peers": 2}},
    "ffl": {"ffl": {"num_peers": 2, "fusion_weight_decay": 0.01}},
    "kdcl": {"kdcl": {"num_peers": 2}},
}


def course_of(method: str, world: World) -> Course:
    """In float64, with BatchNorm over all ranks."""
    return course("sync-own", world, method=method, **RIVALS[method])


def courses() -> Courses:
    """On a rank."""
    with joined(CPU, 60) as world:
        return {method: course_of(method, world) for method in RIVALS}


@pytest.fixture(scope="module")
def by_rank(tmp_path_factory: pytest.TempPathFactory) -> list[Courses]:
    """The courses of both ranks, by the method."""
    return run_ranks(tmp_path_factory.mktemp("ranks"), 2, courses)


@pytest.mark.parametrize("method", RIVALS)
def test_two_ranks_do_what_one_process_does(method: str, by_rank: list[Courses]) -> None:
    expected, found = course_of(method, ALONE), by_rank[0][method]
    assert expected.state.keys() == found.state.keys()
    for entry, tensor in expected.state.items():
        assert_close(found.state[entry], tensor, entry)
    rows = torch.tensor([found.measured_GM, expected.measured_GM], dtype=torch.float64)
    for number, (one, other) in enumerate(zip(*rows.mT, strict=True)):
        assert_close(one, other, f"measured {number}")


@pytest.mark.parametrize("method", RIVALS)
def test_both_have_the_same_bits_after_every_step(method: str, by_rank: list[Courses]) -> None:
    first, second = (rank[method] for rank in by_rank)
    assert len(set(first.digests_G)) == 12, "every step changes something"
    assert first.digests_G == second.digests_G
    assert first.measured_GM == second.measured_GM


def test_the_gate_s_statistics_are_those_of_the_ranks_together(tmp_path: Path) -> None:
    """By the trainer, each rank with BatchNorm of its own batches, and with that of all: another run."""
    ends: list[torch.Tensor] = []
    for name, sync in (("local", False), ("sync", True)):
        chosen = config_of(2, method="one", one={"num_peers": 2}, sync_bn=sync)
        found = run_ranks(tmp_path / f"{name} ranks", 2, train_rank, [tmp_path / name, chosen])
        assert found[0] == found[1]
        assert found[0]["accuracies"].keys() == {"peer1", "peer2", "ensemble"}
        network = newest_checkpoint(tmp_path / name)["state"]["network"]
        ends.append(network["ensemble.norm.running_var"])
        assert network["ensemble.norm.num_batches_tracked"] == found[0]["steps"]
    assert not torch.equal(*ends)


def end_when_saved() -> None:
    """By SIGKILL, after a save that is under way."""
    for thread in threading.enumerate():
        if thread.name == "saver":
            thread.join()
    get_signal(signal.SIGKILL)


@pytest.mark.parametrize("words", [["--method", "one", "--sync-bn"], ["--method", "kdcl"]], ids=" ".join)
def test_a_run_that_was_killed_ends_as_one_that_was_not(
    words: list[str], photos: Path, tmp_path: Path
) -> None:
    """Both ranks, by SIGKILL, in the second epoch; the same command goes on after the first."""
    straight, killed = (training(photos, tmp_path / name, *words) for name in ("straight", "killed"))
    outcomes = run(tmp_path / "a", straight)
    assert codes(outcomes) == [0, 0], said(outcomes)
    faults = (Fault(rank, STEP, end_when_saved, 5) for rank in range(2))
    outcomes = run(tmp_path / "b", killed, *faults)
    assert codes(outcomes) == [-signal.SIGKILL] * 2, said(outcomes)
    assert newest_checkpoint(tmp_path / "killed")["progress"]["steps_done"] == STEPS_PER_EPOCH
    outcomes = run(tmp_path / "c", killed)
    assert codes(outcomes) == [0, 0], said(outcomes)
    assert_same_run(tmp_path / "killed", tmp_path / "straight")
