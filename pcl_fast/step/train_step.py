"""One training step: forward, losses, backward, SGD, mean teachers."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pcl_fast.contract import PeerOutputs, ViewBatch
from pcl_fast.objectives.base import Loss, full_precision
from pcl_fast.step.reduction import times
from pcl_fast.step.state import TrainState


@dataclass(frozen=True, slots=True)
class Moment:
    """Where in its schedules a step is: `step` from 1, lr, w(e), phi(g) and mixup's lambda.

    Numbers, or scalars on the device (int64, float64) for a step that no host looks after.
    """

    step: int | Tensor
    lr: float | Tensor
    distill_weight: float | Tensor
    ema_coefficient: float | Tensor
    mixup: float | Tensor = 1.0


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
    if state.regularise is not None:
        batch = state.regularise(batch, _on_device(moment.mixup, batch.labels_B))
    student, teacher = _forwards(state, batch.views_VBCHW)
    weight = _on_device(moment.distill_weight, batch.labels_B)
    loss = state.objective.loss(student, teacher, batch.labels_B, weight)
    watched = _differentiate(state, loss, len(batch.labels_B))
    lost = None if state.loss_scale is None else state.loss_scale.undo(state.arena.buffers.gradients)
    metrics = StepMetrics(loss.terms, loss.correct, state.arena.gradient_norm())
    _update(state, [watched, metrics.gradient_norm], lost, moment)
    return metrics


def _differentiate(state: TrainState, loss: Loss, images: int) -> Tensor:
    """The gradients of the mean loss over the images of all ranks, and what to watch besides their norm."""
    roots, seeds, scale = loss.roots, loss.seeds, state.loss_scale
    if scale is not None:
        seeds = scale.applied(seeds, roots)
    if state.reduction is None:
        state.arena.differentiate(roots, seeds)
        return loss.terms
    if scale is None:
        state.arena.differentiate(roots, times(seeds, roots, images))
        return state.reduction(images, [loss.terms, state.arena.gradient_norm()])
    state.arena.differentiate(roots, seeds)
    state.arena.buffers.gradients.mul_(images)  # not before: float16 may have no room for it
    return state.reduction(images, [loss.terms, scale.alarming(state.arena.gradient_norm())])


def _forwards(state: TrainState, views_VBCHW: Tensor) -> tuple[PeerOutputs, PeerOutputs | None]:
    """The student's outputs, and the mean teachers'; side by side where the device can."""
    forward = state.teacher_forward

    def teach() -> PeerOutputs | None:
        with torch.no_grad():
            # `is not None`: a compiled network has no truth value
            return None if forward is None else forward(views_VBCHW)

    with torch.autocast(views_VBCHW.device.type, state.amp_dtype, enabled=state.amp_dtype.itemsize < 4):
        if state.arena.student_half:  # both networks read the images in it
            views_VBCHW = views_VBCHW.to(state.amp_dtype)
        teacher, student = state.fork([teach, lambda: state.student_forward(views_VBCHW)])
    assert student is not None
    return (student if state.loss_scale is None else _full_precision(student)), teacher


def _full_precision(outputs: PeerOutputs) -> PeerOutputs:
    """With logits in float32, so that their gradients are multiplied before float16 holds them."""
    ensemble_BC = outputs.ensemble_logits_BC
    return dataclasses.replace(
        outputs,
        logits_VBC=full_precision(outputs.logits_VBC),
        ensemble_logits_BC=None if ensemble_BC is None else full_precision(ensemble_BC),
    )


def _update(state: TrainState, watched: Sequence[Tensor], lost: Tensor | None, moment: Moment) -> None:
    """SGD, then the mean teachers (PCL eq. 4); neither in a spike, nor once anything was not finite.

    `lost` is above 0 in a step whose gradients did not fit into float16: that is skipped, too.
    """
    stop = state.guard.watch(watched, moment.step)
    if lost is not None:
        stop = torch.maximum(stop, lost)
    if state.spikes is not None:
        stop = torch.maximum(stop, state.spikes.watch(watched[-1]))
    lr, phi = (_on_device(value, stop) for value in (moment.lr, moment.ema_coefficient))
    state.arena.update(lr, phi, stop)
    if state.mean_teacher is not None:
        state.mean_teacher.follow_statistics(state.network, torch.where(stop > 0, 1.0, phi))


def _on_device(value: float | Tensor, beside: Tensor) -> Tensor:
    """A float64 scalar where `beside` is."""
    if isinstance(value, Tensor):
        return value
    return torch.full((), value, dtype=torch.float64, device=beside.device)
