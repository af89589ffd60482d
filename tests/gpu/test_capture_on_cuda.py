"""Steps replayed as a CUDA graph against the same kernels called one by one: the same bits.

With deterministic kernels, in whole runs: loader, schedules, evaluation, records, checkpoints.
"""

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pcl_fast.errors import Preempted
from pcl_fast.schedules import ema_coefficient, learning_rate, rampup_weight
from pcl_fast.step.timetable import Timetable
from pcl_fast.step.train_step import Moment
from pcl_fast.trainer import train_together
from tests.gpu.captured import BATCH, DEVICE, assert_same, config_of, data_of, graphs, make_trainer, run
from tests.tiny import SignalAtStep, newest_checkpoint

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]
IMAGES, EPOCHS = 25 * BATCH, 4
STEPS = 100


@pytest.mark.parametrize("host_fed", [False, True], ids=["resident", "host-fed"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("method", ["pcl", "vanilla"])
def test_a_hundred_replays_are_a_hundred_steps(
    tmp_path: Path, method: str, dtype: str, host_fed: bool
) -> None:
    for capture in ("on", "off"):
        config = config_of(capture, dtype, EPOCHS, method=method, pcl={"num_peers": 3})
        said = run(tmp_path / capture, config, IMAGES, host_fed=host_fed)
        assert graphs(said) == (capture == "on")
    assert newest_checkpoint(tmp_path / "on")["progress"]["steps_done"] == STEPS
    assert_same(tmp_path / "on", tmp_path / "off")


class Recorded(Timetable):
    """Writes down, by operations of the graph, what the schedules said at each step."""

    rows_G4: Tensor

    def on_device(self, step: Tensor) -> Moment:
        moment = super().on_device(step)
        numbers = [step, moment.lr, moment.distill_weight, moment.ema_coefficient]
        row_4 = torch.stack([number.double() for number in numbers if isinstance(number, Tensor)])
        self.rows_G4.index_copy_(0, (step - 1).view(1), row_4[None])
        return moment


def test_the_graph_itself_goes_through_the_schedules(tmp_path: Path) -> None:
    """phi to its ceiling and beyond, w through its ramp, the learning rate past both milestones."""
    pcl = {"num_peers": 2, "ema_decay": 0.95, "rampup_epochs": 5.0, "distill_weight": 0.8}
    config = config_of(epochs=8, pcl=pcl)
    trainer, watcher = make_trainer(tmp_path, config, data_of(config, 6 * BATCH))
    timetable = Recorded(config, 6, torch.device(DEVICE))
    timetable.rows_G4 = torch.zeros(48, 4, dtype=torch.float64, device=DEVICE)
    trainer.device_step.timetable = timetable
    trainer.run()
    assert graphs(watcher.messages) == 1
    optim = config.optim
    expected = [
        [
            step + 1.0,
            learning_rate(optim.lr, step // 6, 8, optim.milestones, optim.gamma),
            rampup_weight(step // 6, 0.8, 5.0),
            ema_coefficient(step + 1, 0.95),
        ]
        for step in range(48)
    ]
    assert timetable.rows_G4.tolist() == expected


@pytest.mark.parametrize("host_fed", [False, True], ids=["resident", "host-fed"])
@pytest.mark.parametrize("step", [2, 17, 25], ids=["before the graph", "amid an epoch", "at its end"])
def test_a_stop_and_going_on_change_nothing(tmp_path: Path, step: int, host_fed: bool) -> None:
    """Under capture, and with capture in the second part only."""
    config = config_of(epochs=2)
    run(tmp_path / "straight", config, IMAGES, host_fed=host_fed)
    for first, name in ((config, "both"), (config_of("off", epochs=2), "second")):
        stopped, _ = make_trainer(
            tmp_path / name, first, data_of(first, IMAGES, host_fed), [SignalAtStep(step)]
        )
        with pytest.raises(Preempted):
            stopped.run()
        run(tmp_path / name, config, IMAGES, host_fed=host_fed)
        assert_same(tmp_path / name, tmp_path / "straight")


def test_each_size_of_batch_has_its_graph(tmp_path: Path) -> None:
    """A last batch of five comes once an epoch: three plain calls, then a graph of its own."""
    for capture in ("on", "off"):
        config = config_of(capture, epochs=6, train={"eval_every": 2})
        said = run(tmp_path / capture, config, 3 * BATCH + 5, drop_last=False)
        assert graphs(said) == 2 * (capture == "on")
    assert_same(tmp_path / "on", tmp_path / "off")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_seeds_side_by_side_in_one_graph_are_each_alone(tmp_path: Path, dtype: str) -> None:
    seeds = range(3)
    for seed in seeds:
        run(tmp_path / f"alone{seed}", config_of(dtype=dtype, seed=seed))
    trainers: list[Any] = []
    watchers: list[Any] = []
    for seed in seeds:
        config = config_of(dtype=dtype, seed=seed)
        trainer, watcher = make_trainer(tmp_path / f"beside{seed}", config, data_of(config, 8 * BATCH))
        trainers.append(trainer)
        watchers.append(watcher)
    train_together(trainers)
    for seed in seeds:
        assert graphs(watchers[seed].messages) == 1
        assert_same(tmp_path / f"beside{seed}", tmp_path / f"alone{seed}")


def test_one_of_several_that_lags_behind_has_graphs_of_its_own(tmp_path: Path) -> None:
    """It catches up alone, then goes on with the other: two groups, two graphs, the same bits."""
    for seed in range(2):
        run(tmp_path / f"alone{seed}", config_of(seed=seed))
    first = config_of(seed=0)
    stopped, _ = make_trainer(tmp_path / "0", first, data_of(first, 8 * BATCH), [SignalAtStep(12)])
    with contextlib.suppress(Preempted):
        stopped.run()
    pairs = [
        make_trainer(tmp_path / str(seed), config, data_of(config, 8 * BATCH))
        for seed, config in ((0, first), (1, config_of(seed=1)))
    ]
    train_together([trainer for trainer, _ in pairs])
    assert graphs(pairs[1][1].messages) == 2
    for seed in range(2):
        assert_same(tmp_path / str(seed), tmp_path / f"alone{seed}")
