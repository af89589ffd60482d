"""One training step: forward, losses, backward, SGD, mean teachers."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pcl_fast.contract import PeerOutputs, ViewBatch
from pcl_fast.step.state import TrainState


@dataclass(frozen=True, slots=True)
class Moment:
    """Where in its schedules a step is: `step` from 1, lr, w(e) and phi(g)."""

    step: int
    lr: float
    distill_weight: float
    ema_coefficient: float


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """What a step measured, on the device.

    `terms` [terms], whose sum is the loss; right answers `correct` [peers (+ ensemble)]; the norm of
    all gradients.
    """

    terms: Tensor
    correct: Tensor
    gradient_norm: Tensor


def train_step(state: TrainState, batch: ViewBatch, moment: Moment) -> StepMetrics:
    """Advance `state` by one batch. Does no I/O and never waits for the device."""
    with torch.autocast(batch.views_VBCHW.device.type, state.amp_dtype, enabled=state.amp_dtype.itemsize < 4):
        student = state.student_forward(batch.views_VBCHW)
        with torch.no_grad():
            # `is not None`: a compiled network has no truth value
            teacher = None if state.teacher_forward is None else state.teacher_forward(batch.views_VBCHW)
    terms = state.objective.terms(student, teacher, batch.labels_B, moment.distill_weight)
    state.optimizer.zero_grad(set_to_none=True)
    terms.sum().backward()
    gradients = [p.grad for p in state.network.parameters() if p.grad is not None]
    metrics = StepMetrics(
        terms=terms.detach(),
        correct=_correct(student, batch.labels_B),
        gradient_norm=torch.nn.utils.get_total_norm(gradients),
    )
    _update(state, metrics, moment)
    return metrics


def _update(state: TrainState, metrics: StepMetrics, moment: Moment) -> None:
    """SGD, then the mean teachers (PCL eq. 4); neither, once anything was not finite."""
    watched = torch.cat([metrics.terms, metrics.gradient_norm[None]])
    stop = state.guard.watch(watched, moment.step)
    state.optimizer.found_inf = stop  # pyright: ignore[reportAttributeAccessIssue]  # read by the fused SGD
    for group in state.optimizer.param_groups:
        group["lr"] = moment.lr
    state.optimizer.step()
    if state.mean_teacher is not None:
        phi = torch.full_like(stop, moment.ema_coefficient, dtype=torch.float64)
        state.mean_teacher.update(state.network, torch.where(stop > 0, 1.0, phi))


@torch.no_grad()
def _correct(outputs: PeerOutputs, labels_B: Tensor) -> Tensor:
    answers = outputs.logits_VBC.argmax(-1)
    if outputs.ensemble_logits_BC is not None:
        answers = torch.cat([answers, outputs.ensemble_logits_BC.argmax(-1)[None]])
    return (answers == labels_B).sum(-1)
