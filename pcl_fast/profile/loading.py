"""How fast loaders are, and what binds them: measured in turn, in one process, past their warm-up."""

import contextlib
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from pcl_fast.contract import ended

DECODE_ALONE = 0
"""In the place of a number of views: each image is decoded, and next to nothing made of it."""
BUSY = 0.75


class Loader(Protocol):
    """What is measured: anything with epochs of batches."""

    def epoch(self, epoch: int) -> Iterator[Any]:
        """The batches of an epoch."""
        ...


@dataclass(frozen=True, slots=True)
class Window:
    """The part of an epoch that is timed: `batches` after the first `lead`, and as many are left after it.

    What a loader has made ahead when the clock starts, it has made ahead again when it stops.
    """

    batch_size: int
    lead: int
    batches: int


@dataclass(frozen=True, slots=True)
class Sample:
    """Images a second, cores busy, bytes in use beyond those before, and seconds until the clock ran."""

    images: float
    cores: float
    memory: int
    warmup: float


@dataclass(slots=True)
class Contender:
    """A loader of so many views an image: started once, then measured in turn with others."""

    views: int
    open: Callable[[], Loader]
    decodes: int = 1
    """Times that an image is decoded."""
    cold: Sample | None = None
    """The first sample: its memory and its warm-up are the loader's."""
    samples: list[Sample] = field(default_factory=list[Sample])
    _loader: Loader | None = None

    def start(self, window: Window, device: torch.device) -> Sample:
        """Open the loader and take the sample `cold`; raises what the loader raises."""
        before, began = memory_in_use(), time.perf_counter()
        self._loader = self.open()
        self.cold = self._sample(0, window, device, before, began)
        return self.cold

    def measure(self, epoch: int, window: Window, device: torch.device) -> None:
        """Take one more sample."""
        self.samples.append(self._sample(epoch, window, device, memory_in_use(), time.perf_counter()))

    def _sample(self, epoch: int, window: Window, device: torch.device, before: int, began: float) -> Sample:
        assert self._loader is not None
        with ended(self._loader.epoch(epoch)) as batches:
            _pull(batches, window.lead, device)
            started, cpu = time.perf_counter(), cpu_seconds()
            _pull(batches, window.batches, device)
            seconds, busy = time.perf_counter() - started, cpu_seconds() - cpu
            memory = max(0, memory_in_use() - before)
        images = window.batches * window.batch_size / seconds
        return Sample(images, busy / seconds, memory, started - began)

    @property
    def images(self) -> float:
        """Images a second, the median."""
        return statistics.median(sample.images for sample in self.samples)

    @property
    def cores(self) -> float:
        """Cores busy, the median."""
        return statistics.median(sample.cores for sample in self.samples)


@dataclass(frozen=True, slots=True)
class Shares:
    """What an image's time goes into: parts of 1; `hand_over` is what neither decoding nor views explain."""

    decode: float
    views: float
    hand_over: float


def shares(contenders: Mapping[int, Contender]) -> Shares:
    """Shares at the most views, of one loader's contenders by their views, DECODE_ALONE among them.

    A view costs what one more view adds. With a single number of views, what hands over is among views.
    """
    seconds = {views: 1 / contender.images for views, contender in contenders.items()}
    once = seconds.pop(DECODE_ALONE)
    most = max(seconds)
    decodes = contenders[most].decodes
    rest = max(0.0, seconds[most] - decodes * once)
    views = rest
    if len(seconds) > 1:
        a_view = _slope(seconds) - (once if decodes > 1 else 0.0)
        views = min(rest, max(0.0, most * a_view))
    total = decodes * once + rest
    return Shares(decodes * once / total, views / total, (rest - views) / total)


def verdict(contenders: Mapping[int, Contender], available: int) -> str:
    """What binds one loader at the most views, in a line."""
    most = max(contenders)
    parts, cores = shares(contenders), contenders[most].cores
    named = {"decoding": parts.decode, "making views": parts.views, "handing over": parts.hand_over}
    told = ", ".join(f"{name} {share:.0%}" for name, share in named.items())
    busy = f"{cores:.1f} of {available} cores busy"
    if cores < BUSY * available:
        return f"{busy}: neither binds; its threads wait for each other, or others use the machine ({told})"
    return f"{busy}: {max(named, key=lambda name: named[name])} binds ({told})"


def interleave(contenders: Sequence[Contender], repeats: int, window: Window, device: torch.device) -> None:
    """Measure each in turn, `repeats` times, so that a drift of the machine's speed meets them all."""
    for repeat in range(1, repeats + 1):
        for contender in contenders:
            contender.measure(repeat, window, device)


def cpu_seconds() -> float:
    """Processor time of this process and the workers it has now."""
    return time.process_time() + sum(_child_seconds(child.pid) for child in multiprocessing.active_children())


def cores_available() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def memory_in_use() -> int:
    """Bytes of this process and its workers that are not a file's; what they share counts once."""
    pids = ["self", *(str(child.pid) for child in multiprocessing.active_children())]
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):  # elsewhere than on Linux, or of a worker that has just ended
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith(("Pss_Anon:", "Pss_Shmem:")):
                    total += 1024 * int(line.split()[1])
    return total


def _child_seconds(pid: int | None) -> float:
    try:
        # The name in brackets may hold anything; 11 fields after it come the ticks, of user and system.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / 100  # Linux counts in hundredths on every platform


def _pull(batches: Iterator[Any], count: int, device: torch.device) -> None:
    for _ in range(count):
        next(batches)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _slope(seconds: Mapping[int, float]) -> float:
    """Least squares: seconds that one more view adds."""
    return statistics.linear_regression(list(seconds), list(seconds.values())).slope
