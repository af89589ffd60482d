"""The step as a whole: it waits for nothing, measures what it says, and survives half precision."""

import copy

import pytest
import torch

from pcl_fast.step.obstacles import find_obstacle
from pcl_fast.step.train_step import train_step
from tests.step.tiny import BATCH, make_batches, moment, parameters, tiny_state, train


@pytest.mark.parametrize("ema_bn", ["own", "copy", "ema"])
def test_a_step_never_waits_for_the_device(ema_bn: str) -> None:
    state = tiny_state(ema_bn=ema_bn)
    batches = make_batches(2)
    assert find_obstacle(lambda: train(state, batches)) is None
    assert find_obstacle(state.guard.check) is not None


@pytest.mark.gpu
@pytest.mark.parametrize("ema_bn", ["own", "copy", "ema"])
def test_a_step_never_waits_for_the_gpu(ema_bn: str) -> None:
    state = tiny_state(ema_bn=ema_bn, device="cuda")
    batches = make_batches(3, device="cuda")
    train(state, batches[:1])  # what is made once may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        train(state, batches[1:], first_step=2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    state.guard.check()


def test_the_metrics_are_what_they_say() -> None:
    """Right answers of every head before the update, the norm of all gradients, terms by name."""
    state = tiny_state()
    (batch,) = make_batches(1)
    out = copy.deepcopy(state.network)(batch.views_VBCHW)
    metrics = train_step(state, batch, moment(1))
    heads = [*out.logits_VBC, out.ensemble_logits_BC]
    right = [
        sum(int(row.argmax()) == int(y) for row, y in zip(z, batch.labels_B, strict=True)) for z in heads
    ]
    assert metrics.correct.tolist() == right
    squares = [
        p.grad.double().square().sum().item() for p in state.network.parameters() if p.grad is not None
    ]
    assert metrics.gradient_norm.item() == pytest.approx(sum(squares) ** 0.5, rel=1e-5)
    assert len(metrics.terms) == len(state.objective.term_names) == len(state.guard.names) - 1
    assert not metrics.terms.requires_grad


def test_gradients_of_a_step_are_not_added_to_those_of_the_last() -> None:
    first, second = make_batches(2)
    state = tiny_state()
    train(state, [first])
    twin = copy.deepcopy(state.network)
    train_step(state, second, moment(2, distill_weight=0.0))
    out = twin(second.views_VBCHW)
    losses = [torch.nn.functional.cross_entropy(z, second.labels_B) for z in out.logits_VBC]
    losses.append(torch.nn.functional.cross_entropy(out.ensemble_logits_BC, second.labels_B))
    twin.zero_grad()
    torch.stack(losses).sum().backward()
    for name, parameter in state.network.named_parameters():
        torch.testing.assert_close(parameter.grad, twin.get_parameter(name).grad, rtol=1e-3, atol=1e-5)


def test_a_step_in_bfloat16_is_near_that_in_float32() -> None:
    (batch,) = make_batches(1)
    half, full = tiny_state("bfloat16"), tiny_state("float32")
    assert half.amp_dtype == torch.bfloat16
    near, exact = (train_step(state, batch, moment(1)) for state in (half, full))
    assert near.terms.dtype == torch.float32
    torch.testing.assert_close(near.terms, exact.terms, rtol=0.05, atol=0.05)
    torch.testing.assert_close(near.gradient_norm, exact.gradient_norm, rtol=0.05, atol=0)
    assert not torch.equal(near.terms, exact.terms)
    half.guard.check()
    ours, theirs = parameters(half.network), parameters(full.network)
    for name, value in ours.items():
        assert value.dtype == torch.float32
        moved = (theirs[name] - value).norm() / (theirs[name].norm() + 0.1)
        assert moved < 0.05, name


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_training_learns_a_batch_by_heart(dtype: str) -> None:
    """Every head, student's and mean teacher's, gets right what it has seen often."""
    state = tiny_state(dtype)
    (batch,) = make_batches(1)
    metrics = train(state, [batch] * 25)
    assert metrics[-1].correct.tolist() == [BATCH] * 4
    assert metrics[-1].terms[:4].sum() < 0.2 * metrics[0].terms[:4].sum()
    assert state.mean_teacher is not None
    answers = state.mean_teacher.network(batch.views_VBCHW).logits_VBC.argmax(-1)
    assert (answers == batch.labels_B).all()
