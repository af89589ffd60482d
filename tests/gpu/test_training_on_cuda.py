"""The whole step on a CUDA device against the same step on the CPU."""

import dataclasses

import pytest
import torch

from pcl_fast.build import build_state
from pcl_fast.config import AmpConfig, Config, DataConfig, PclConfig
from pcl_fast.contract import ViewBatch
from pcl_fast.device import resolve
from pcl_fast.errors import DivergedError
from pcl_fast.step.state import TrainState
from pcl_fast.step.train_step import Moment, train_step

pytestmark = pytest.mark.gpu


def config_on(device: str, dtype: str, **pcl: object) -> Config:
    options = dataclasses.replace(PclConfig(rampup_epochs=1.0), **pcl)
    return resolve(
        Config(model="resnet8", device=device, amp=AmpConfig(dtype=dtype), pcl=options, data=DataConfig())  # type: ignore[arg-type]
    )


def three_steps(config: Config) -> tuple[TrainState, torch.Tensor]:
    """The state after three steps on fixed noise, and the loss terms of each."""
    state = build_state(config)
    state.network.train()
    draws = torch.Generator().manual_seed(3)
    layout = torch.channels_last if config.channels_last == "on" else torch.contiguous_format
    history = []
    for step in range(1, 4):
        views = torch.randn(3 * 16, 3, 32, 32, generator=draws).to(config.device, memory_format=layout)
        labels = torch.randint(10, (16,), generator=draws).to(config.device)
        batch = ViewBatch(views.unflatten(0, (3, 16)), labels, torch.arange(16, device=config.device))
        history.append(train_step(state, batch, Moment(step, 0.05, 1.0, 0.5)).terms.cpu())
    state.guard.check()
    return state, torch.stack(history)


def test_three_float32_steps_equal_those_of_the_cpu() -> None:
    tf32 = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        _, on_cuda = three_steps(config_on("cuda", "float32"))
    finally:
        torch.backends.cudnn.allow_tf32 = tf32
    _, on_cpu = three_steps(config_on("cpu", "float32"))
    torch.testing.assert_close(on_cuda, on_cpu, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_batched_views_equal_views_in_turn(dtype: str) -> None:
    batched, terms = three_steps(config_on("cuda", dtype))
    loop, expected = three_steps(config_on("cuda", dtype, trunk_views="loop"))
    torch.testing.assert_close(terms, expected, rtol=5e-2, atol=5e-2)
    for mine, other in zip(batched.network.buffers(), loop.network.buffers(), strict=True):
        torch.testing.assert_close(mine, other, rtol=5e-2, atol=5e-2)


def test_a_bad_loss_leaves_the_weights_alone_until_the_host_looks() -> None:
    config = config_on("cuda", "bfloat16")
    state, _ = three_steps(config)
    before = [parameter.clone() for parameter in state.network.parameters()]
    views = torch.full((3, 16, 3, 32, 32), float("nan"), device="cuda")
    ids = torch.arange(16, device="cuda")
    train_step(state, ViewBatch(views, ids % 10, ids), Moment(4, 0.05, 1.0, 0.5))
    train_step(state, ViewBatch(torch.zeros_like(views), ids % 10, ids), Moment(5, 0.05, 1.0, 0.5))
    with pytest.raises(DivergedError, match="step 4"):
        state.guard.check()
    for parameter, old in zip(state.network.parameters(), before, strict=True):
        assert torch.equal(parameter, old)


def test_a_step_never_waits_for_the_device() -> None:
    """Under CUDA's own watch on synchronisation, from the second step on."""
    config = config_on("cuda", "bfloat16")
    state, _ = three_steps(config)
    views = torch.randn(3, 16, 3, 32, 32, device="cuda")
    ids = torch.arange(16, device="cuda")
    batch = ViewBatch(views, ids % 10, ids)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        metrics = train_step(state, batch, Moment(4, 0.05, 1.0, 0.5))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(metrics.terms).all()
