"""Measuring loaders, against loaders whose cost is known."""

import multiprocessing
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from pcl_fast.profile.loading import (
    DECODE_ALONE,
    Contender,
    Sample,
    Window,
    cpu_seconds,
    interleave,
    memory_in_use,
    shares,
    verdict,
)

CPU = torch.device("cpu")
WINDOW = Window(batch_size=4, lead=2, batches=5)


class Sleeper:
    """Takes so many seconds a batch, after a slow start, without using a processor."""

    def __init__(self, seconds: float, memory: int = 0) -> None:
        self.seconds, self.closed, self.kept = seconds, 0, np.ones(memory, np.uint8)

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


def of(rates: dict[int, float], cores: float = 2.0, decodes: int = 1) -> dict[int, Contender]:
    """Contenders of these images a second, by their views."""
    found: dict[int, Contender] = {}
    for views, rate in rates.items():
        found[views] = Contender(views, Spinner, decodes, samples=[Sample(rate, cores, 0, 0.0)] * 3)
    return found


def test_rates_are_of_the_window_and_the_start_is_told_apart() -> None:
    fast = Sleeper(0.02)
    contenders = [Contender(1, lambda: Sleeper(0.04, memory=64 << 20)), Contender(1, lambda: fast)]
    for contender in contenders:
        contender.start(WINDOW, CPU)
    interleave(contenders, 3, WINDOW, CPU)
    for contender, seconds in zip(contenders, (0.04, 0.02), strict=True):
        assert contender.cold is not None
        assert len(contender.samples) == 3
        assert 0.3 + 2 * seconds <= contender.cold.warmup < 1.5
        assert 0.5 * 4 / seconds < contender.images <= 4 / seconds
        assert contender.cores < 0.3
    assert contenders[0].cold is not None
    assert (64 << 20) <= contenders[0].cold.memory < (80 << 20)
    assert fast.closed == 4


def test_a_busy_core_is_seen() -> None:
    contender = Contender(1, Spinner)
    contender.start(WINDOW, CPU)
    contender.measure(1, WINDOW, CPU)
    assert 0.1 < contender.cores <= 1.1
    assert contender.images <= 4 / 0.03


def _spin(seconds: float, started: "multiprocessing.synchronize.Event") -> None:  # type: ignore[name-defined]
    memory = np.ones(32 << 20, np.uint8)
    until = time.process_time() + seconds
    while time.process_time() < until:
        pass
    started.set()
    time.sleep(60)
    del memory


def test_time_and_memory_of_workers_count() -> None:
    context = multiprocessing.get_context("fork")
    started = context.Event()
    before, memory = cpu_seconds(), memory_in_use()
    worker = context.Process(target=_spin, args=(0.5, started), daemon=True)
    worker.start()
    try:
        assert started.wait(30)
        assert cpu_seconds() - before >= 0.45
        assert (30 << 20) <= memory_in_use() - memory < (60 << 20)
    finally:
        worker.kill()
        worker.join()


def test_shares_are_those_that_made_the_times() -> None:
    """Decode 4 ms, each view 1 ms, handing over 2 ms."""
    found = shares(of({DECODE_ALONE: 1 / 4e-3, 1: 1 / 7e-3, 2: 1 / 8e-3, 4: 1 / 10e-3}))
    assert (found.decode, found.views, found.hand_over) == pytest.approx((0.4, 0.4, 0.2))
    found = shares(of({DECODE_ALONE: 1 / 4e-3, 4: 1 / 10e-3}))
    assert (found.decode, found.views, found.hand_over) == pytest.approx((0.4, 0.6, 0.0))


def test_a_decode_for_each_view_is_counted_so() -> None:
    rates = {views: 1 / (views * 5e-3 + 1e-3) for views in (1, 2, 3)}
    found = shares(of({DECODE_ALONE: 1 / 4e-3, **rates}, decodes=1) | of({3: rates[3]}, decodes=3))
    assert (found.decode, found.views, found.hand_over) == pytest.approx((12 / 16, 3 / 16, 1 / 16))


def test_noise_makes_no_shares_below_zero() -> None:
    found = shares(of({DECODE_ALONE: 200.0, 1: 210.0, 3: 190.0}))
    assert min(found.decode, found.views, found.hand_over) >= 0
    assert found.decode + found.views + found.hand_over == pytest.approx(1)


def test_the_verdict_names_what_binds() -> None:
    rates = {DECODE_ALONE: 1 / 4e-3, 1: 1 / 5e-3, 3: 1 / 7e-3}
    assert verdict(of(rates), 2).startswith("2.0 of 2 cores busy: decoding binds (decoding 57%, ")
    rates = {DECODE_ALONE: 1 / 1e-3, 1: 1 / 5e-3, 3: 1 / 13e-3}
    assert "making views binds" in verdict(of(rates), 2)
    assert verdict(of(rates, cores=1.0), 2).startswith("1.0 of 2 cores busy: neither binds")
