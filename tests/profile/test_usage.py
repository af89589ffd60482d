"""What processes use, against what they are made to use."""

import gc
import multiprocessing
import os
import subprocess
import sys
import time

import pytest
import torch

from pcl_fast.profile.usage import PeakMemory, cores_available, idle_seconds
from tests.conftest import REPOSITORY

# In a process of its own: what earlier tests left would be given back meanwhile.
MEASURE = """
import multiprocessing, time
import numpy as np
from pcl_fast.profile.usage import cpu_seconds, memory_in_use

def spin(seconds, started):
    memory = np.ones(32 << 20, np.uint8)
    until = time.process_time() + seconds
    while time.process_time() < until:
        pass
    started.set()
    time.sleep(60)

empty = memory_in_use()
own = np.ones(64 << 20, np.uint8)
assert 60 << 20 < memory_in_use() - empty < 80 << 20, memory_in_use() - empty
context = multiprocessing.get_context("fork")
started = context.Event()
before, memory = cpu_seconds(), memory_in_use()
worker = context.Process(target=spin, args=(0.5, started), daemon=True)
worker.start()
assert started.wait(30)
assert cpu_seconds() - before >= 0.45, cpu_seconds() - before
assert 30 << 20 < memory_in_use() - memory < 60 << 20, memory_in_use() - memory
worker.kill()
worker.join()
"""


def test_time_and_memory_of_this_process_and_its_workers() -> None:
    variables = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", MEASURE], env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_idle_time_is_at_most_that_of_all_cores() -> None:
    before, began = idle_seconds(), time.monotonic()
    time.sleep(0.5)
    assert 0 <= idle_seconds() - before <= multiprocessing.cpu_count() * (time.monotonic() - began) + 0.5
    assert 1 <= cores_available() <= multiprocessing.cpu_count()


def test_the_peak_is_what_was_in_use_at_most_since_then() -> None:
    gc.collect()
    size = 64 << 20
    torch.ones(3 * size // 4)
    memory = PeakMemory(torch.device("cpu"))
    assert memory.read() < size / 4, "what was before does not count"
    kept = torch.ones(size // 4)
    assert 0.95 * size < memory.read() < 1.25 * size
    del kept
    again = torch.ones(size // 8)
    # The C library may or may not put the second where the first was.
    assert 0.95 * size < memory.read() < 1.75 * size, "freed, but it was in use"
    assert PeakMemory(torch.device("cpu")).read() < size / 4
    del again


@pytest.mark.gpu
def test_the_peak_of_a_gpu() -> None:
    device = torch.device("cuda")
    before = torch.ones(1 << 20, device=device)
    memory = PeakMemory(device)
    torch.ones(1 << 22, device=device).add_(before[0])
    assert 4 << 22 <= memory.read() < 5 << 22
