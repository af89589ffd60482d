"""Mixup's lambda: its distribution, and what it is a function of."""

import math
from collections.abc import Callable

import pytest
import torch

from pcl_fast.config import Config, TrainConfig
from pcl_fast.device import resolve
from pcl_fast.schedules import mixup_shares
from pcl_fast.step.timetable import Timetable

COUNT = 40_000
DISTRIBUTIONS: dict[float, Callable[[float], float]] = {
    0.5: lambda x: 2 / math.pi * math.asin(math.sqrt(x)),
    1.0: lambda x: x,
    2.0: lambda x: 3 * x**2 - 2 * x**3,
    3.0: lambda x: 10 * x**3 - 15 * x**4 + 6 * x**5,
}


@pytest.mark.parametrize("alpha", DISTRIBUTIONS)
def test_they_follow_the_beta_distribution(alpha: float) -> None:
    """Kolmogorov and Smirnov, one false alarm in 1,000; these have closed forms."""
    drawn = sorted(mixup_shares(alpha, 5, COUNT))
    furthest = max(abs(DISTRIBUTIONS[alpha](x) - k / COUNT) for k, x in enumerate(drawn))
    assert furthest < 1.95 / math.sqrt(COUNT)


@pytest.mark.parametrize("alpha", [0.1, 0.2, 0.4, 1.5, 8.0, 100.0])
def test_they_have_the_moments_of_the_beta_distribution(alpha: float) -> None:
    """Mean 1/2, variance 1 / (4 (2 a + 1)), kurtosis 3 - 6 / (2 a + 3), within five standard errors."""
    drawn = torch.tensor(mixup_shares(alpha, 6, COUNT), dtype=torch.float64) - 0.5
    variance = 1 / (4 * (2 * alpha + 1))
    fourth = variance**2 * (3 - 6 / (2 * alpha + 3))
    assert abs(drawn.mean()) < 5 * math.sqrt(variance / COUNT)
    assert abs(drawn.square().mean() - variance) < 5 * math.sqrt((fourth - variance**2) / COUNT)
    assert abs((drawn**4).mean() - fourth) < 5 * (drawn**4).std() / math.sqrt(COUNT)
    assert abs(torch.corrcoef(torch.stack([drawn[1:], drawn[:-1]]))[0, 1]) < 5 / math.sqrt(COUNT)


@pytest.mark.parametrize("alpha", [1e-6, 1e-3, 1e6])
def test_extreme_shapes_stay_shares(alpha: float) -> None:
    drawn = mixup_shares(alpha, 0, 1000)
    assert all(0 <= value <= 1 for value in drawn)
    if alpha < 1:
        assert sum(min(value, 1 - value) for value in drawn) < 1, "all of one image"
    else:
        assert max(abs(value - 0.5) for value in drawn) < 0.01


def test_they_are_functions_of_seed_and_step_alone() -> None:
    whole = mixup_shares(0.2, 3, 100)
    assert mixup_shares(0.2, 3, 37) == whole[:37]
    assert not set(mixup_shares(0.2, 4, 100)) & set(whole)
    assert len(set(whole)) == 100


@pytest.mark.parametrize("mixup", [0.0, 0.4])
def test_the_timetable_says_them_on_the_host_and_on_the_device(mixup: float) -> None:
    config = resolve(Config(device="cpu", seed=9, ranks=2, train=TrainConfig(epochs=3, mixup=mixup)))
    table = Timetable(config, 5, torch.device("cpu"))
    expected = mixup_shares(mixup, 9, 15) if mixup else [1.0] * 15
    assert [table.on_host(step).mixup for step in range(1, 16)] == expected
    assert [float(table.on_device(torch.tensor(step)).mixup) for step in range(1, 16)] == expected
