"""Properties of the schedules, beyond the equations in test_paper.py."""

import itertools
import math

import pytest

from pcl_fast.schedules import (
    ema_coefficient,
    learning_rate,
    milestone_epoch,
    rampup_weight,
    view_size,
    warmup_factor,
)


@pytest.mark.parametrize(
    ("share", "epochs", "epoch"),
    [
        (150 / 300, 300, 150),
        (225 / 300, 300, 225),
        (30 / 90, 90, 30),
        (60 / 90, 90, 60),
        (1 / 3, 3, 1),
        (0.07, 100, 7),  # although 0.07 * 100 is 7.000000000000001
        (0.29, 100, 29),  # and 0.29 * 100 is 28.999999999999996
        (0.5, 5, 3),  # 2.5 falls between epochs: the rate falls at the next one
        (0.75, 10, 8),
        (0.001, 300, 1),
        (0.999, 10, 10),  # after the last epoch: never
    ],
)
def test_a_milestone_is_the_first_epoch_at_or_after_its_share(share: float, epochs: int, epoch: int) -> None:
    assert milestone_epoch(share, epochs) == epoch


def test_shares_written_as_fractions_always_fall_on_their_epoch() -> None:
    """Whatever k / n rounds to, share k / n of n epochs is epoch k."""
    wrong = [(k, n) for n in range(1, 401) for k in range(1, n) if milestone_epoch(k / n, n) != k]
    assert wrong == []


def test_the_rate_falls_once_at_each_milestone() -> None:
    rates = [learning_rate(0.4, epoch, 10, (0.25, 0.5, 0.95), 0.5) for epoch in range(10)]
    assert rates == pytest.approx([0.4] * 3 + [0.2] * 2 + [0.1] * 5, rel=1e-15)
    assert [learning_rate(0.4, epoch, 10, (), 0.5) for epoch in range(10)] == [0.4] * 10
    assert learning_rate(1.0, 9, 10, (0.5, 0.5), 0.1) == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("steps", "factors"),
    [
        (0, [1.0] * 4),
        (1, [1.0] * 4),
        (4, [0.25, 0.5, 0.75, 1.0, 1.0]),
        (2.5, [0.4, 0.8, 1.0, 1.0]),
        (0.07 * 100, [1 / 7, 2 / 7, 3 / 7, 4 / 7, 5 / 7, 6 / 7, 1.0]),  # though 0.07 * 100 is above 7
        (0.5, [1.0, 1.0]),
    ],
)
def test_the_warm_up_rises_in_equal_steps_to_one(steps: float, factors: list[float]) -> None:
    assert [warmup_factor(step, steps) for step in range(1, len(factors) + 1)] == factors


@pytest.mark.parametrize("alpha", [1.0, 2.666667, 20.0, 80.0])
def test_the_weight_never_falls_and_has_no_jump(alpha: float) -> None:
    weights = [rampup_weight(epoch, 1.0, alpha) for epoch in range(100)]
    assert weights == sorted(weights)
    assert weights[0] == pytest.approx(math.exp(-5), rel=1e-15)
    assert weights[math.ceil(alpha) :] == [1.0] * (100 - math.ceil(alpha))
    steepest = math.sqrt(10 / math.e) / alpha  # of exp(-5 (1 - x)^2), at 1 - x = 1 / sqrt(10)
    rises = [later - earlier for earlier, later in itertools.pairwise(weights)]
    assert max(rises) <= steepest


def test_the_weight_is_full_at_alpha_itself_and_for_a_fractional_alpha_after_it() -> None:
    assert rampup_weight(8, 0.5, 8.0) == 0.5
    assert rampup_weight(2, 1.0, 2.5) == pytest.approx(math.exp(-5 * 0.2**2), rel=1e-15)
    assert rampup_weight(3, 1.0, 2.5) == 1.0


def test_the_ema_of_constant_coefficients_is_the_mean_of_the_first_steps() -> None:
    """With phi(g) = 1 - 1/g the average of g values is their mean, until the ceiling is met."""
    average = 1e9  # forgotten at the first update
    for g in range(1, 21):
        phi = ema_coefficient(g, 0.95)
        average = phi * average + (1 - phi) * g**2
        assert average == pytest.approx(sum(k**2 for k in range(1, g + 1)) / g, rel=1e-12)
    assert ema_coefficient(21, 0.95) == 0.95
    assert [ema_coefficient(g, 0.0) for g in (1, 2, 100)] == [0.0] * 3


def sizes(epochs: int, start: int, until: float, pixels: int) -> list[int]:
    return [view_size(epoch, epochs, start, until, pixels) for epoch in range(epochs)]


def test_views_grow_linearly_to_their_full_size() -> None:
    """From 128 to 224 in 8 of 10 epochs, 12 pixels an epoch: 128, 140, 152, 164, 176, 188, 200, 212."""
    assert sizes(10, 128, 0.8, 224) == [128, 128, 160, 160, 192, 192, 192, 224, 224, 224]


@pytest.mark.parametrize("epochs", [1, 2, 16, 30, 90, 300])
@pytest.mark.parametrize("until", [0.1, 0.333, 0.75, 1.0])
@pytest.mark.parametrize(("start", "pixels"), [(128, 224), (32, 176), (96, 100), (224, 224), (32, 32)])
def test_view_sizes_are_near_the_line(epochs: int, until: float, start: int, pixels: int) -> None:
    found = sizes(epochs, start, until, pixels)
    assert found[0] == start
    assert found == sorted(found)
    assert all(size % 32 == 0 or size == pixels for size in found)
    assert max(found) <= pixels
    for epoch, size in enumerate(found):
        share = epoch / (until * epochs)
        if share >= 1 - 1e-9:
            assert size == pixels
        else:
            assert abs(size - (start + share * (pixels - start))) <= 16
