"""What processes use, against what they are made to use."""

import multiprocessing
import time
from typing import Any

import numpy as np

from pcl_fast.profile.usage import cores_available, cpu_seconds, idle_seconds, memory_in_use


def _spin(seconds: float, started: Any) -> None:
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


def test_idle_time_is_at_most_that_of_all_cores() -> None:
    before, began = idle_seconds(), time.monotonic()
    time.sleep(0.5)
    assert 0 <= idle_seconds() - before <= multiprocessing.cpu_count() * (time.monotonic() - began) + 0.5
    assert 1 <= cores_available() <= multiprocessing.cpu_count()
