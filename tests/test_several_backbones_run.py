"""Training with peers of different backbones: against plain networks side by side, and the run around it."""

from pathlib import Path
from typing import Literal

import pytest
import torch

from pcl_fast.build import build_state
from pcl_fast.commands.settings import choose
from pcl_fast.config import AmpConfig, Config, PclConfig
from pcl_fast.contract import ViewBatch
from pcl_fast.device import resolve
from pcl_fast.errors import ConfigError, Preempted
from pcl_fast.kernels import conv_norm
from pcl_fast.models.zoo import find_backbone
from pcl_fast.step.state import TrainState
from pcl_fast.step.train_step import Moment, train_step
from tests.naive_rivals import NaivePeers
from tests.test_rivals_run import check_pcl
from tests.tiny import SignalAtStep, assert_same_run, read_model, tiny_config, train


def state_of(model: str, split: str | None) -> TrainState:
    config = Config(
        model=model, split=split, device="cpu", amp=AmpConfig(dtype="float32"), pcl=PclConfig(num_peers=2)
    )
    return build_state(resolve(config), torch.float64)


@pytest.mark.parametrize(
    ("model", "split", "steps"), [("resnet8,resnet20", None, 10), ("resnet8,resnet110", "none", 2)]
)
def test_pcl_equals_plain_networks_side_by_side(model: str, split: str | None, steps: int) -> None:
    """Losses, networks, the ensemble's classifier, and mean teachers with statistics of their own."""
    state = state_of(model, split)
    plain = [find_backbone(name).build(10).double() for name in model.split(",")]
    for peer, network in enumerate(plain):
        network.load_state_dict(state.network.deployed_state_dict(peer), strict=split == "none" or peer == 0)
    check_pcl(state, NaivePeers(plain, shares=split is None).train(), steps)


def test_a_run_that_was_stopped_ends_as_one_that_was_not(tmp_path: Path) -> None:
    """What it leaves is the first peer's plain network, and says so."""
    config = tiny_config(model="resnet8,resnet20")
    trainer = train(tmp_path / "whole", config)
    with pytest.raises(Preempted):
        train(tmp_path / "cut", config, [SignalAtStep(5)])
    train(tmp_path / "cut", config)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    left = read_model(tmp_path / "whole" / "model.safetensors")
    assert left["about"]["model"] == "resnet8"
    find_backbone("resnet8").build(10).load_state_dict(left["tensors"])
    heads = {"peer1", "peer2", "ensemble", "mean_teacher1", "mean_teacher2", "mean_ensemble"}
    assert heads <= trainer.accuracies.keys()


def first_gradients(kernels: str, dtype: Literal["float32", "bfloat16"]) -> torch.Tensor:
    """Of all weights, of a step of two backbones, channels-last."""
    views = torch.randn(2, 8, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    precision = AmpConfig(dtype=dtype)
    config = tiny_config(model="resnet8,resnet20", channels_last="on", kernels=kernels, amp=precision)
    state = build_state(config)
    train_step(state, ViewBatch(views, torch.arange(8) % 10, torch.arange(8)), Moment(1, 0.05, 1.0, 0.0))
    return state.arena.buffers.gradients


@pytest.mark.skipif(conv_norm.why_unavailable() is not None, reason=str(conv_norm.why_unavailable()))
def test_fused_blocks_are_as_exact_as_torch_s_bfloat16() -> None:
    exact = first_gradients("off", "float32")
    torchs, ours = ((first_gradients(how, "bfloat16") - exact).norm() for how in ("off", "auto"))
    assert 0 < ours < 1.3 * torchs
    assert torchs < 0.3 * exact.norm()


def test_backbones_that_do_not_fit_are_refused_before_a_run() -> None:
    words = ["cifar10-resnet32", "--data.backend", "synthetic", "--model"]
    with pytest.raises(ConfigError, match="peer 2, resnet110, goes on from a trunk's 128 x 16 x 16"):
        choose("train", [*words, "resnet8,resnet110,resnet8"])
    (config, _) = choose("train", [*words, "resnet8,resnet20,resnet8"]).runs[0]
    assert config.model == "resnet8,resnet20,resnet8"
