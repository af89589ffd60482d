"""Measuring loaders, against loaders whose cost is known."""

import itertools
import time
from collections.abc import Iterator

import pytest
import torch

from pcl_fast.profile import loading
from pcl_fast.profile.loading import Contender, Window, interleave

CPU = torch.device("cpu")
WINDOW = Window(batch_size=4, lead=2, batches=5)


class Sleeper:
    """Takes so many seconds a batch, after a slow start, without using a processor."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.closed = seconds, 0

    def epoch(self, epoch: int) -> Iterator[int]:
        try:
            time.sleep(0.3)
            for number in range(WINDOW.batches + 2 * WINDOW.lead):
                time.sleep(self.seconds)
                yield number
        finally:
            self.closed += 1


class Spinner:
    """Keeps a core busy."""

    def epoch(self, epoch: int) -> Iterator[int]:
        for number in range(WINDOW.batches + 2 * WINDOW.lead):
            until = time.process_time() + 0.03
            while time.process_time() < until:
                pass
            yield number


def test_rates_are_of_the_window_and_the_start_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = itertools.count(step=7)  # what it reads is tested in test_usage.py
    monkeypatch.setattr(loading, "memory_in_use", lambda: next(readings))
    fast = Sleeper(0.02)
    contenders = [Contender(1, lambda: Sleeper(0.04)), Contender(1, lambda: fast)]
    for contender in contenders:
        contender.start(WINDOW, CPU)
    interleave(contenders, 3, WINDOW, CPU)
    for contender, seconds in zip(contenders, (0.04, 0.02), strict=True):
        assert contender.cold is not None
        assert len(contender.samples) == 3
        assert 0.3 + 2 * seconds <= contender.cold.warmup < 1.5
        assert contender.cold.memory == 7
        assert 0.5 * 4 / seconds < contender.images <= 4 / seconds
        assert contender.cores < 0.3
    assert fast.closed == 4


def test_a_busy_core_is_seen() -> None:
    contender = Contender(1, Spinner)
    contender.start(WINDOW, CPU)
    contender.measure(1, WINDOW, CPU)
    assert 0.1 < contender.cores <= 1.1
    assert contender.images <= 4 / 0.03
