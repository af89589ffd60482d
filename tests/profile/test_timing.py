"""Timing against work whose length is known."""

import statistics
import time
from collections.abc import Callable

import torch

from pcl_fast.profile.timing import Timed, Timing, time_interleaved

CPU = torch.device("cpu")


def sleeping(seconds: float, name: str = "", calls: list[str] | None = None) -> Callable[[], None]:
    def call() -> None:
        if calls is not None:
            calls.append(name)
        time.sleep(seconds)

    return call


def test_ratios_are_those_of_the_work() -> None:
    timings = time_interleaved(
        {"long": Timed(sleeping(0.04), 1), "short": Timed(sleeping(0.01), 3)}, CPU, repeats=3
    )
    assert 0.04 <= timings["long"].median < 0.1
    assert 0.01 <= timings["short"].median < 0.03
    assert (timings["long"].ratio, timings["long"].ratio_spread) == (1, (1, 1))
    found = timings["short"]
    pairs = [a / b for a, b in zip(timings["long"].seconds, found.seconds, strict=True)]
    assert found.ratio == statistics.median(pairs)
    assert found.ratio_spread == (min(pairs), max(pairs))
    assert found.steps == 3
    assert 1.5 < found.ratio < 8


def test_in_turn_and_what_leads_is_not_timed() -> None:
    calls: list[str] = []
    slow_at_first = iter([0.2, 0.001, 0.001] * 2)

    def warming() -> None:
        calls.append("b")
        time.sleep(next(slow_at_first))

    timings = time_interleaved(
        {"a": Timed(sleeping(0.001, "a", calls), 2), "b": Timed(warming, 2, lead=1)}, CPU, repeats=2
    )
    assert "".join(calls) == "aabbb" * 2
    assert all(seconds < 0.1 for seconds in timings["b"].seconds)


def test_nothing_is_timed_of_nothing() -> None:
    assert time_interleaved({}, CPU, repeats=2) == {}


def test_the_median_is_of_the_samples() -> None:
    assert Timing([3.0, 1.0, 2.0], 1, 1.0, (1.0, 1.0)).median == 2.0
