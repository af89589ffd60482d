"""KDCL general on two ranks: what one process measures, the same bits on both, also after a stop."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pcl_fast.config import KdclConfig
from pcl_fast.dist import joined
from pcl_fast.errors import Preempted
from pcl_fast.sinks import read_records
from tests.dist.parts import CPU, config_of, data_of
from tests.dist.ranks import run_ranks
from tests.dist.runs import train_here
from tests.tiny import SignalAtStep, SignalInEvaluation, assert_same_run

HELD = 7  # three on a rank, four on the other
EPOCHS = 3


def go(path: Path, ranks: int, stopped_by: int | None = None, look: int | None = None) -> dict[str, Any]:
    """Train; rank 1 gets a signal after a step, or while it looks at the held-out images for the nth time."""
    changes: dict[str, Any] = {
        "method": "kdcl",
        "kdcl": KdclConfig(num_peers=3, target="general"),
        "data": {"hold_out": HELD},
        "train": {"epochs": EPOCHS, "eval_batch_size": 2},
        "sync_bn": True,
    }
    with joined(CPU, 60) as world:
        config = config_of(ranks, **changes)
        data = data_of(config, world.rank)
        sinks = [SignalAtStep(stopped_by)] if stopped_by is not None and world.rank == 1 else []
        if look is not None and world.rank == 1:
            assert data.held_out is not None
            data = type(data)(data.train, data.val, SignalInEvaluation(data.held_out, look))
        try:
            trainer = train_here(path, config, world, data, sinks)
        except Preempted:
            return {}
        return {"weights": trainer.objective.memory["weights"], "images": data.train.num_samples}


def weights_of(folder: Path) -> torch.Tensor:
    """Of every epoch, [epochs, V]."""
    records = read_records(folder / "metrics.jsonl")
    return torch.tensor([r["held_out"]["weights"] for r in records if r["kind"] == "epoch"]).double()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs `1` and `2`, of so many ranks."""
    path = tmp_path_factory.mktemp("runs")
    torch.set_num_threads(1)
    alone = go(path / "1", 1)
    first, second = run_ranks(path / "ranks", 2, go, [path / "2", 2])
    assert alone["images"] == first["images"] == 32 - HELD
    assert torch.equal(first["weights"], second["weights"])
    return path


def test_two_ranks_measure_what_one_process_does(folder: Path) -> None:
    one, two = (weights_of(folder / ranks) for ranks in ("1", "2"))
    assert one.shape == (EPOCHS, 3)
    assert (one - 1 / 3).abs().amax(1).min() > 1e-4
    torch.testing.assert_close(two, one, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(two[0], one[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("step", "look"), [(4, None), (None, 2)], ids=["between epochs", "while it looks"])
def test_a_run_that_a_rank_s_signal_stopped_goes_on_to_the_same_end(
    step: int | None, look: int | None, folder: Path, tmp_path: Path
) -> None:
    assert run_ranks(tmp_path / "a", 2, go, [tmp_path / "run", 2, step, look]) == [{}, {}]
    run_ranks(tmp_path / "b", 2, go, [tmp_path / "run", 2])
    assert_same_run(tmp_path / "run", folder / "2")
