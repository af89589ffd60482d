"""Mixup and label smoothing against loops and torch; steps that use them."""

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pcl_fast.build import build_state
from pcl_fast.contract import PeerOutputs, ViewBatch
from pcl_fast.objectives import METHODS
from pcl_fast.step.obstacles import find_obstacle
from pcl_fast.step.regularise import Regularisation, make_regularisation
from pcl_fast.step.state import TrainState
from pcl_fast.step.train_step import StepMetrics, train_step
from tests.step.tiny import BATCH, CLASSES, make_batches, moment, parameters, tiny_config

MIXES = Regularisation(num_classes=CLASSES, mixes=True)
METHODS_WITHOUT_A_TEACHER = [method for method in METHODS if method != "kd"]


def share(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def batch_of(images: int, dtype: torch.dtype = torch.float32, channels_last: bool = False) -> ViewBatch:
    draws = torch.Generator().manual_seed(3)
    views = torch.randn(2 * images, 3, 5, 6, generator=draws, dtype=torch.float64).to(dtype)
    views = views.contiguous(memory_format=torch.channels_last) if channels_last else views
    labels = torch.randint(CLASSES, (images,), generator=draws)
    return ViewBatch(views.unflatten(0, (2, images)), labels, torch.arange(images))


def regularised_state(method: str = "pcl", **changes: Any) -> TrainState:
    config = tiny_config(**changes.pop("pcl", {}))
    train = dataclasses.replace(config.train, **({"mixup": 0.4, "label_smoothing": 0.1} | changes))
    return build_state(dataclasses.replace(config, method=method, train=train))


def test_nothing_is_made_where_nothing_is_asked_for() -> None:
    assert make_regularisation(tiny_config()) is None
    assert build_state(tiny_config()).regularise is None


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_smoothed_labels_are_torchs(smoothing: float, dtype: torch.dtype) -> None:
    batch, logits = batch_of(7, dtype), torch.randn(7, CLASSES, dtype=dtype, requires_grad=True)
    rule = Regularisation(num_classes=CLASSES, smoothing=smoothing)
    found = rule(batch, share(0.3))
    assert found.views_VBCHW is batch.views_VBCHW, "it mixes nothing"
    assert found.labels_B.dtype == dtype
    ours = F.cross_entropy(logits, found.labels_B)
    theirs = F.cross_entropy(logits, batch.labels_B, label_smoothing=smoothing)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in (ours, theirs)))


@pytest.mark.parametrize("images", [1, 2, 5, 8])
@pytest.mark.parametrize("value", [0.0, 0.25, 0.7])
def test_each_image_and_its_label_are_mixed_with_the_same_partner_in_every_view(
    images: int, value: float
) -> None:
    batch = batch_of(images, torch.float64)
    rule = Regularisation(num_classes=CLASSES, smoothing=0.2, mixes=True)
    found = rule(batch, share(value))
    for image in range(images):
        partner = images - 1 - image
        for view in range(2):
            own, other = batch.views_VBCHW[view, image], batch.views_VBCHW[view, partner]
            torch.testing.assert_close(
                found.views_VBCHW[view, image], value * own + (1 - value) * other, rtol=1e-12, atol=1e-14
            )
        expected = [0.2 / CLASSES] * CLASSES
        expected[batch.labels_B[image]] += 0.8 * value
        expected[batch.labels_B[partner]] += 0.8 * (1 - value)
        torch.testing.assert_close(found.labels_B[image].tolist(), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_all_of_an_image_is_that_image_to_the_bit(dtype: torch.dtype, channels_last: bool) -> None:
    batch = batch_of(6, dtype, channels_last)
    before = batch.views_VBCHW.clone()
    found = MIXES(batch, share(1.0))
    assert torch.equal(found.views_VBCHW, batch.views_VBCHW)
    assert torch.equal(found.labels_B, F.one_hot(batch.labels_B, CLASSES).float())
    for value in (1.0, 0.3):
        mixed = MIXES(batch, share(value)).views_VBCHW
        assert mixed.dtype == dtype
        assert mixed.stride() == batch.views_VBCHW.stride()
    assert torch.equal(batch.views_VBCHW, before), "the loader's batch is written to"


def test_labels_say_what_is_in_views_of_half_precision() -> None:
    """0.3 is 0.30078125 in bfloat16."""
    batch = batch_of(4, torch.bfloat16)
    found = MIXES(batch, share(0.3))
    exact = 0.30078125 * batch.views_VBCHW.float() + (1 - 0.30078125) * batch.views_VBCHW.float().flip(1)
    torch.testing.assert_close(found.views_VBCHW.float(), exact, rtol=2**-8, atol=0)
    onehot = F.one_hot(batch.labels_B, CLASSES).float()
    torch.testing.assert_close(found.labels_B, 0.30078125 * onehot + (1 - 0.30078125) * onehot.flip(0))


def test_student_and_mean_teachers_see_the_same_mixed_views() -> None:
    state, seen = regularised_state(), list[Tensor]()
    assert state.teacher_forward is not None
    for name in ("student_forward", "teacher_forward"):
        forward = getattr(state, name)

        def watched(views_VBCHW: Tensor, forward: Any = forward) -> PeerOutputs:
            seen.append(views_VBCHW)
            return forward(views_VBCHW)

        setattr(state, name, watched)
    batch = make_batches(1)[0]
    train_step(state, batch, moment(1, mixup=0.25))
    mixed = 0.25 * batch.views_VBCHW + 0.75 * batch.views_VBCHW.flip(1)
    assert len(seen) == 2
    for views in seen:
        torch.testing.assert_close(views, mixed)


def test_a_step_with_nothing_mixed_in_is_the_plain_step() -> None:
    plain, mixing = build_state(tiny_config()), regularised_state(label_smoothing=0.0)
    for step, batch in enumerate(make_batches(3), start=1):
        expected = train_step(plain, batch, moment(step))
        found = train_step(mixing, batch, moment(step, mixup=1.0))
        assert torch.equal(found.correct, expected.correct)
        torch.testing.assert_close(found.terms, expected.terms, rtol=1e-6, atol=0)
    for ours, theirs in zip(mixing.network.parameters(), plain.network.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("method", METHODS_WITHOUT_A_TEACHER)
def test_every_method_takes_a_step_that_asks_the_host_for_nothing(method: str) -> None:
    state = regularised_state(method)
    batch, before = make_batches(1, state.objective.num_views)[0], parameters(state.network)
    metrics: list[StepMetrics] = []
    at = dataclasses.replace(moment(1, mixup=share(0.3)), step=torch.tensor(1))
    assert find_obstacle(lambda: metrics.append(train_step(state, batch, at))) is None
    assert metrics[0].terms.isfinite().all()
    assert ((metrics[0].correct >= 0) & (metrics[0].correct <= BATCH)).all()
    assert all(not torch.equal(before[name], value) for name, value in parameters(state.network).items())


@pytest.mark.parametrize("peers", range(1, 9))
def test_any_number_of_peers_learns_from_mixed_images(peers: int) -> None:
    state = regularised_state(pcl={"num_peers": peers})
    batch = make_batches(1, peers)[0]
    losses = [train_step(state, batch, moment(step, mixup=0.3)).terms[:peers].sum() for step in range(1, 9)]
    assert losses[-1] < losses[0]
