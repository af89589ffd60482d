"""A rank on a GPU: the step as one CUDA graph with its all-reduce inside, by NCCL, in a world of one."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pcl_fast.dist import joined
from pcl_fast.errors import Preempted
from pcl_fast.run_folder import RunFolder
from pcl_fast.sinks import JsonlSink
from pcl_fast.trainer import Trainer
from tests.dist.ranks import run_ranks
from tests.gpu.captured import BATCH, DEVICE, assert_same, config_of, data_of, graphs, run
from tests.tiny import SignalAtStep

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]
IMAGES = 10 * BATCH  # two epochs are twenty steps
NEVER = 0


def train_rank(path: Path, capture: str, changes: dict[str, Any], stop_at: int = NEVER) -> list[str]:
    """Train as the only rank, to the end or a signal, and leave the group; what was said."""
    with joined(torch.device(DEVICE), 120) as world:
        assert world.is_joined
        config = config_of(capture, epochs=2, **changes)
        watcher, folder = SignalAtStep(stop_at), RunFolder(path)
        sinks = JsonlSink(folder.metrics), watcher
        trainer = Trainer(config, data_of(config, IMAGES), folder, sinks, world)
        try:
            trainer.run()
        except Preempted:
            assert stop_at != NEVER
        return watcher.messages


WAYS: dict[str, dict[str, Any]] = {
    "local": {"pcl": {"num_peers": 3}},
    "sync": {"pcl": {"num_peers": 3}, "sync_bn": True},
    "bfloat16": {"dtype": "bfloat16", "dist": {"reduce_dtype": "bfloat16"}},
    "vanilla": {"method": "vanilla"},
}


@pytest.mark.parametrize("way", WAYS)
def test_replays_with_the_all_reduce_inside_are_the_steps(tmp_path: Path, way: str) -> None:
    """And the rank ends by itself, its graph and its group behind it."""
    for capture in ("on", "off"):
        args = [tmp_path / capture, capture, WAYS[way]]
        (said,) = run_ranks(tmp_path / f"ranks-{capture}", 1, train_rank, args, seconds=120)
        assert graphs(said) == (capture == "on")
    assert_same(tmp_path / "on", tmp_path / "off")


def test_a_captured_rank_goes_on_without_torchrun(tmp_path: Path) -> None:
    """Sixteen times a number, divided by sixteen, is that number."""
    run(tmp_path / "straight", config_of(epochs=2), IMAGES)
    run_ranks(tmp_path / "ranks", 1, train_rank, [tmp_path / "both", "on", {}, 13], seconds=120)
    run(tmp_path / "both", config_of(epochs=2), IMAGES)
    assert_same(tmp_path / "both", tmp_path / "straight")
