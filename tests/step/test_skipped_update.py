"""A step that is not finite changes nothing: weights, momentum and averages stay those of the one before."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pcl_fast.contract import PeerOutputs
from pcl_fast.errors import DivergedError
from pcl_fast.step.state import TrainState
from pcl_fast.step.train_step import train_step
from tests.step.tiny import equal, make_batches, moment, parameters, tiny_state, train

Change = Callable[[Tensor], Tensor]


def everything(state: TrainState) -> dict[str, Tensor]:
    """Copies of all parameters, averages and momentum buffers."""
    assert state.mean_teacher is not None
    copies = parameters(state.network)
    copies |= {f"mean {name}": value for name, value in parameters(state.mean_teacher.network).items()}
    return copies | {f"momentum {name}": value.clone() for name, value in state.arena.momentum.items()}


def change_logits(state: TrainState, change: Change) -> None:
    """Let `change` at the logits of every later step."""
    forward = state.student_forward

    def changed(views_VBCHW: Tensor) -> PeerOutputs:
        out = forward(views_VBCHW)
        return dataclasses.replace(out, logits_VBC=change(out.logits_VBC))

    state.student_forward = changed


def nan_in_peer_two(logits_VBC: Tensor) -> Tensor:
    logits_VBC = logits_VBC.clone()
    logits_VBC[1, 0, 0] = float("nan")
    return logits_VBC


def infinite_gradient(logits_VBC: Tensor) -> Tensor:
    logits_VBC.register_hook(lambda gradient: gradient * float("inf"))
    return logits_VBC


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (nan_in_peer_two, "ce/peer2, pe/peer2, pm/peer2, gradient norm"),
        (infinite_gradient, "gradient norm"),
    ],
)
def test_a_bad_step_and_all_after_it_are_skipped(change: Change, named: str) -> None:
    state = tiny_state()
    batches = make_batches(6)
    train(state, batches[:3])
    before = everything(state)
    healthy = state.student_forward
    change_logits(state, change)
    train(state, batches[3:4], first_step=4)
    assert equal(everything(state), before)
    state.student_forward = healthy
    later = train(state, batches[4:], first_step=5)
    assert all(metrics.terms.isfinite().all() for metrics in later)
    assert equal(everything(state), before)
    with pytest.raises(DivergedError, match=rf"^step 4: not finite: {named}; "):
        state.guard.check()


def test_no_kernel_hides_what_is_not_a_number() -> None:
    """A ReLU could: then only the gradients would tell, and no term be named. Here also with C++ kernels."""
    state = tiny_state("bfloat16")
    (batch,) = make_batches(1)
    batch.views_VBCHW[1, 0, 0, 3, 3] = float("nan")
    train(state, [batch])
    with pytest.raises(DivergedError, match=r"^step 1: not finite: ce/peer2, ce/ensemble, .*gradient norm"):
        state.guard.check()


def test_the_first_step_can_be_the_bad_one() -> None:
    state = tiny_state()
    assert state.mean_teacher is not None
    before = parameters(state.network)
    change_logits(state, nan_in_peer_two)
    train_step(state, make_batches(1)[0], moment(1))
    assert equal(parameters(state.network), before)
    assert equal(parameters(state.mean_teacher.network), before)


def test_the_same_steps_without_the_fault_do_move_everything() -> None:
    """The control of the tests above."""
    state = tiny_state()
    batches = make_batches(4)
    train(state, batches[:3])
    before = everything(state)
    train(state, batches[3:], first_step=4)
    after = everything(state)
    assert [name for name in after if torch.equal(after[name], before[name])] == []
    state.guard.check()
