"""Every method, network, number of peers and of classes is captured, and computes what it does uncaptured."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pcl_fast.build import build_state
from pcl_fast.contract import ViewBatch
from pcl_fast.step.capture import CapturedCalls
from pcl_fast.step.train_step import Moment, train_step
from tests.gpu.captured import BATCH, DEVICE, assert_same, config_of, graphs, run

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

KINDS: dict[str, dict[str, Any]] = {
    **{f"{m} peers": {"pcl": {"num_peers": m}} for m in range(1, 9)},
    "statistics copied": {"pcl": {"ema_bn": "copy"}},
    "statistics averaged": {"pcl": {"ema_bn": "ema"}},
    "ensemble not detached": {"pcl": {"detach_ensemble": False}},
    "no ensemble teacher": {"pcl": {"ensemble_teacher": False}},
    "no mean teachers": {"pcl": {"mean_teacher": False}},
    "mutual learning": {"pcl": {"mutual_learning": True}},
    "one view": {"pcl": {"view_per_peer": False}},
    "views in turn": {"pcl": {"trunk_views": "loop"}},
    "joint statistics": {"pcl": {"bn_views": "joint"}},
    "without our kernels": {"kernels": "off"},
    "not channels-last": {"channels_last": "off"},
    "vanilla": {"method": "vanilla"},
    "1000 classes": {"data": {"num_classes": 1000}},
    "plain SGD": {"optim": {"momentum": 0.0, "nesterov": False}},
}
IN_FLOAT32 = ("1 peers", "3 peers", "statistics averaged", "ensemble not detached", "vanilla")


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [*((kind, "bfloat16") for kind in KINDS), *((kind, "float32") for kind in IN_FLOAT32)],
)
def test_it_is_captured_and_the_same_as_uncaptured(tmp_path: Path, kind: str, dtype: str) -> None:
    """Ten steps: three plain ones, a capture, replays over the end of an epoch."""
    for capture in ("on", "off"):
        config = config_of(capture, dtype, epochs=2, **KINDS[kind])
        assert graphs(run(tmp_path / capture, config, 5 * BATCH)) == (capture == "on")
    assert_same(tmp_path / "on", tmp_path / "off")


@pytest.mark.parametrize("model", ["resnet8", "resnet32", "resnet110", "vgg16", "densenet40_12", "wrn20_8"])
def test_every_network_is_captured(model: str) -> None:
    """On one batch over and over: the loss falls in replays, too."""
    config = config_of(dtype="bfloat16", model=model, deterministic=False, data={"num_classes": 100})
    state = build_state(config)
    draws = torch.Generator().manual_seed(0)
    views = torch.randn(2 * 8, 3, 32, 32, generator=draws).to(DEVICE, memory_format=torch.channels_last)
    labels = torch.randint(100, (8,), generator=draws).to(DEVICE)
    batch = ViewBatch(views.unflatten(0, (2, 8)), labels, torch.arange(8, device=DEVICE))
    said: list[str] = []
    steps_done = torch.zeros((), dtype=torch.int64, device=DEVICE)
    numbers = [torch.full((), value, dtype=torch.float64, device=DEVICE) for value in (0.02, 0.1, 0.5)]
    losses = torch.zeros((), dtype=torch.float32, device=DEVICE)

    def step() -> None:
        steps_done.add_(1)
        metrics = train_step(state, batch, Moment(steps_done, *numbers))
        losses.copy_(metrics.terms[:3].sum())

    calls = CapturedCalls(torch.device(DEVICE), said.append)
    history: list[float] = []
    for _ in range(20):
        calls.run([step], "batch of 8")
        history.append(float(losses))
    calls.close()
    state.guard.check()
    assert graphs(said) == 1
    assert int(steps_done) == 20
    assert len(set(history[5:])) == 15, "a replay does not move the weights"
    assert min(history[-3:]) < 0.9 * history[0]
