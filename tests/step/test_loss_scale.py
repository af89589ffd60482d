"""float16: gradients neither vanish nor overflow unnoticed, and the factor moves as it should."""

import copy
import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pcl_fast.build import build_state
from pcl_fast.dist import joined
from pcl_fast.errors import DivergedError
from pcl_fast.objectives import Loss
from pcl_fast.sinks import Record
from pcl_fast.step.loss_scale import FIRST, PATIENCE, LossScale
from pcl_fast.step.obstacles import find_obstacle
from pcl_fast.step.reduction import times
from pcl_fast.step.state import TrainState
from pcl_fast.step.train_step import train_step
from tests.dist.ranks import run_ranks
from tests.step.test_fake_cuda import fake_cuda, make_step, strays_of
from tests.step.tiny import make_batches, moment, parameters, tiny_config, tiny_state, tiny_trainer, train

__all__ = ["fake_cuda"]  # a fixture

CPU = torch.device("cpu")
USUAL = 2.0**10


def scale_of(state: TrainState) -> LossScale:
    """The loss scale of a run in float16."""
    assert state.loss_scale is not None
    return state.loss_scale


def scaled_state(scale: float = USUAL) -> TrainState:
    """A tiny state in float16, its factor where no gradient of these small batches overflows."""
    state = tiny_state("float16")
    scale_of(state).scale.fill_(scale)
    return state


def steepen(state: TrainState, factor: float) -> None:
    """Make the gradients of all losses from now on so many times as large; not what the losses say."""
    plain = state.objective.loss

    def steep(*args: Any) -> Loss:
        loss = plain(*args)
        return dataclasses.replace(loss, seeds=tuple(times(loss.seeds, loss.roots, factor)))

    state.objective.loss = steep  # pyright: ignore[reportAttributeAccessIssue]


def everything(state: TrainState) -> dict[str, Tensor]:
    """Weights, averages and momentum."""
    flat = state.arena.buffers
    assert flat.averages is not None
    return {name: buffer.clone() for name, buffer in flat.named() if name != "gradients"}


def test_the_factor_is_that_of_torch_s_scaler() -> None:
    """Over 10,000 steps, of which a few overflow, alone or in a row."""
    ours, growing = LossScale(CPU), torch.zeros((), dtype=torch.int32)
    theirs, bad = torch.full((), FIRST), torch.rand(10_000, generator=torch.Generator().manual_seed(4))
    for step, draw in enumerate(bad):
        overflows = bool(draw < 0.0004) or 7_000 <= step < 7_004
        gradients = torch.tensor([3.0, math.inf if overflows else -2.0])
        used = ours.scale.clone()
        assert used == theirs, step
        assert ours.undo(gradients) == float(overflows)
        torch._amp_update_scale_(theirs, growing, torch.tensor(float(overflows)), 2.0, 0.5, PATIENCE)
        assert gradients.tolist() == (
            [0.0, 0.0] if overflows else (torch.tensor([3.0, -2.0]) / used).tolist()
        )
    assert ours.skipped == ((bad < 0.0004).sum() + 4 - (bad[7_000:7_004] < 0.0004).sum())
    assert ours.scale > FIRST / 2 ** int(ours.skipped), "it did both"


@pytest.mark.parametrize("worst", [math.inf, math.nan])
def test_the_factor_never_falls_below_one(worst: float) -> None:
    """What is not finite even so stays, for the guard to see."""
    scale = LossScale(CPU)
    for halvings in range(16):
        assert scale.scale == FIRST / 2**halvings
        assert scale.undo(torch.tensor([worst])) == 1
    gradients = torch.tensor([worst])
    assert not scale.alarming(gradients[0]).isfinite()
    assert scale.undo(gradients) == 0
    assert not gradients.isfinite().any()
    assert scale.scale == 1


@pytest.mark.parametrize("method", ["pcl", "vanilla"])
def test_a_step_in_float16_is_near_that_in_float32(method: str) -> None:
    views = 3 if method == "pcl" else 1
    states = [
        build_state(dataclasses.replace(tiny_config(dtype), method=method))
        for dtype in ("float16", "float32")
    ]
    scale_of(states[0]).scale.fill_(USUAL)
    near, exact = (train_step(state, make_batches(1, views)[0], moment(1)) for state in states)
    assert near.terms.dtype == torch.float32
    assert not torch.equal(near.terms, exact.terms)
    torch.testing.assert_close(near.terms, exact.terms, rtol=0.01, atol=0.01)
    torch.testing.assert_close(near.gradient_norm, exact.gradient_norm, rtol=0.01, atol=0)
    gradients, wanted = (state.arena.buffers.gradients for state in states)
    assert (gradients - wanted).norm() < 0.1 * wanted.norm(), "few images: in bfloat16 it is 1.2"
    states[0].guard.check()


def test_gradients_too_small_for_float16_arrive() -> None:
    """A ten-millionth as steep: without the factor hardly anything would be left of them."""
    (batch,) = make_batches(1)
    half, full, bare = scaled_state(2.0**32), tiny_state("float32"), scaled_state()
    bare.loss_scale = None
    for state in (half, full, bare):
        steepen(state, 1e-7)
        train_step(state, batch, moment(1))
    wanted = full.arena.buffers.gradients
    errors = [(state.arena.buffers.gradients - wanted).norm() / wanted.norm() for state in (half, bare)]
    assert errors[0] < 0.1
    assert errors[1] > 0.2, "the control"


def test_an_overflow_skips_the_step_and_halves_the_factor() -> None:
    state, batches = scaled_state(), make_batches(3)
    train(state, batches[:1])
    before, healthy = everything(state), state.objective.loss
    steepen(state, 1e6)
    (metrics,) = train(state, batches[1:2], first_step=2)
    assert metrics.gradient_norm == 0
    assert metrics.terms.isfinite().all()
    assert all(torch.equal(value, before[name]) for name, value in everything(state).items())
    assert (scale_of(state).scale, scale_of(state).skipped) == (USUAL / 2, 1)
    state.objective.loss = healthy
    train(state, batches[2:], first_step=3)
    state.guard.check()
    assert not any(torch.equal(value, before[name]) for name, value in everything(state).items())


def test_what_is_not_finite_with_any_factor_is_named() -> None:
    state = scaled_state(1.0)
    steepen(state, 1e12)
    before = parameters(state.network)
    train(state, make_batches(1))
    assert all(torch.equal(value, before[name]) for name, value in parameters(state.network).items())
    with pytest.raises(DivergedError, match=r"^step 1: not finite: gradient norm; .*--amp.dtype float32"):
        state.guard.check()


def test_a_restored_state_goes_on_with_its_factor() -> None:
    batches = make_batches(4)
    through, cut = scaled_state(2.0**30), scaled_state(2.0**30)
    train(through, batches)
    train(cut, batches[:2])
    resumed = tiny_state("float16")
    resumed.load_state_dict(copy.deepcopy(cut.state_dict()))
    train(resumed, batches[2:], first_step=3)
    assert scale_of(resumed).skipped == scale_of(through).skipped > 1
    assert scale_of(resumed).scale == scale_of(through).scale < 2.0**29
    assert resumed.checksum() == through.checksum()


def test_a_run_records_how_many_steps_it_skipped(tmp_path: Path) -> None:
    trainer, notes = tiny_trainer(tiny_config("float16"), tmp_path)
    scale_of(trainer.state).scale.fill_(2.0**18)
    trainer.run()
    steps: list[Record] = [record for record in notes.records if record["kind"] == "step"]
    skipped = [record["skipped"] for record in steps]
    assert skipped == sorted(skipped)
    assert 0 < skipped[-1] == scale_of(trainer.state).skipped < len(steps)
    zeros = [record["step"] for record in steps if record["gradient_norm"] == 0]
    assert len(zeros) == skipped[-1]


def step_of_two_ranks() -> dict[str, Any]:
    """Two steps, in the first of which the second rank's gradients overflow."""
    with joined(CPU, 60) as world:
        state = build_state(tiny_config("float16"), world=world)
        scale_of(state).scale.fill_(USUAL)
        healthy = state.objective.loss
        batches = make_batches(2, seed=world.rank)
        if world.rank == 1:
            steepen(state, 1e6)
        first = state.checksum()
        train(state, batches[:1])
        skipped = state.checksum()
        state.objective.loss = healthy
        train(state, batches[1:], first_step=2)
        state.guard.check()
        found = first, skipped, state.checksum()
        scale = scale_of(state)
        return {"checksums": torch.tensor(found), "scale": scale.scale, "skipped": scale.skipped}


def test_ranks_skip_together(tmp_path: Path) -> None:
    one, other = run_ranks(tmp_path, 2, step_of_two_ranks, [])
    for name, value in one.items():
        assert torch.equal(value, other[name]), name
    assert (one["scale"], one["skipped"]) == (USUAL / 2, 1)
    assert one["checksums"].unique().numel() == 3


@pytest.mark.usefixtures("fake_cuda")
@pytest.mark.parametrize("method", ["pcl", "ffl"])
def test_a_step_stays_on_the_device(method: str) -> None:
    step = make_step(method, "float16")
    scale_of(step.state)
    assert not step.state.arena.student_half
    strays: list[str] = []
    assert find_obstacle(lambda: strays.extend(strays_of(step))) is None
    assert strays == []
