"""The tables of a run against the schedules themselves, at every step, on the host and on the device."""

from typing import Any

import pytest
import torch

from pcl_fast.config import Config, OptimConfig, PclConfig, TrainConfig
from pcl_fast.device import resolve
from pcl_fast.schedules import ema_coefficient, learning_rate, rampup_weight, warmup_factor
from pcl_fast.step.timetable import Timetable

CPU = torch.device("cpu")
CASES: list[dict[str, Any]] = [
    {},
    {"ema_decay": 0.0},
    {"ema_decay": 0.7},
    {"ema_decay": 0.999, "epochs": 13, "steps_per_epoch": 97},  # beyond the 1,000 steps of its rise
    {"ema_decay": 0.999, "epochs": 2},  # and not
    {"rampup_epochs": 0.0},
    {"rampup_epochs": 2.5, "distill_weight": 0.3},
    {"rampup_epochs": 100.0},
    {"milestones": (0.2, 0.45, 0.9), "gamma": 0.3},
    {"milestones": ()},
    {"epochs": 1},
    {"epochs": 1, "steps_per_epoch": 1},
    {"epochs": 300, "steps_per_epoch": 3},
    {"warmup_epochs": 5.0},
    {"warmup_epochs": 5.0, "epochs": 8, "steps_per_epoch": 41, "ema_decay": 0.9},  # longer than phi rises
    {"warmup_epochs": 0.07, "steps_per_epoch": 100, "epochs": 2},
    {"warmup_epochs": 1.3, "milestones": (0.125,)},  # the rate falls while it still rises
    {"warmup_epochs": 100.0},  # it never gets there
    {"warmup_epochs": 2.0, "lr_batch": 256, "ranks": 6},
]


def make(
    epochs: int = 8,
    steps_per_epoch: int = 5,
    milestones: tuple[float, ...] = (0.5, 0.75),
    gamma: float = 0.1,
    device: torch.device = CPU,
    ranks: int | None = None,
    warmup_epochs: float = 0.0,
    lr_batch: int | None = None,
    **pcl: Any,
) -> tuple[Config, Timetable]:
    config = resolve(
        Config(
            device="cpu",
            ranks=ranks,
            optim=OptimConfig(
                lr=0.07, milestones=milestones, gamma=gamma, warmup_epochs=warmup_epochs, lr_batch=lr_batch
            ),
            train=TrainConfig(epochs=epochs),
            pcl=PclConfig(**pcl),
        )
    )
    return config, Timetable(config, steps_per_epoch, device)


def scheduled(config: Config, step: int, steps_per_epoch: int) -> tuple[float, float, float]:
    """Learning rate, w(e) and phi(g) as the schedules say."""
    epoch, optim, pcl = (step - 1) // steps_per_epoch, config.optim, config.pcl
    assert pcl.rampup_epochs is not None
    lr = learning_rate(config.initial_lr, epoch, config.train.epochs, optim.milestones, optim.gamma)
    lr *= warmup_factor(step, optim.warmup_epochs * steps_per_epoch)
    weight = rampup_weight(epoch, pcl.distill_weight, pcl.rampup_epochs)
    return lr, weight, ema_coefficient(step, pcl.ema_decay)


def check_every_step(case: dict[str, Any], device: torch.device) -> None:
    config, table = make(device=device, **case)
    total = config.train.epochs * table.steps_per_epoch
    step = torch.zeros((), dtype=torch.int64, device=device)
    for number in range(1, total + 1):
        step += 1
        expected = scheduled(config, number, table.steps_per_epoch)
        host, here = table.on_host(number), table.on_device(step)
        assert (host.lr, host.distill_weight, host.ema_coefficient) == expected
        scalars = (here.lr, here.distill_weight, here.ema_coefficient)
        assert tuple(map(float, scalars)) == expected
        assert {(s.dtype, s.shape, s.device.type) for s in scalars if isinstance(s, torch.Tensor)} == {
            (torch.float64, torch.Size([]), device.type)
        }
        assert host.step == int(here.step) == number
    assert int(step) == total, "looking changes the step"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_both_tables_say_what_the_schedules_say_at_every_step(case: dict[str, Any]) -> None:
    check_every_step(case, CPU)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*CASES[:8], *CASES[-6:]], ids=str)
def test_a_gpus_table_says_the_same(case: dict[str, Any]) -> None:
    check_every_step(case, torch.device("cuda"))


def test_a_border_between_epochs_lies_between_two_steps() -> None:
    """The ramp-up rises with the first step of an epoch, not with the last of the one before."""
    _, table = make(epochs=4, steps_per_epoch=3, rampup_epochs=3.0)
    weights = [table.on_host(step).distill_weight for step in range(1, 13)]
    assert [weights.index(weight) for weight in sorted(set(weights))] == [0, 3, 6, 9]


def test_the_rate_rises_step_by_step_to_that_of_the_global_batch() -> None:
    """0.07 for 256 images, 6 ranks of 128: 0.21, reached at the end of the second epoch."""
    _, table = make(epochs=8, steps_per_epoch=5, warmup_epochs=2.0, lr_batch=256, ranks=6, milestones=(0.5,))
    rates = [table.on_host(step).lr for step in range(1, 41)]
    assert rates[:10] == pytest.approx([0.021 * step for step in range(1, 11)], rel=1e-15)
    assert rates[10:] == pytest.approx([0.21] * 10 + [0.021] * 20, rel=1e-15)
