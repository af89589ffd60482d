"""How fast loaders are: measured in turn, in one process, past their warm-up."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from pcl_fast.contract import ended
from pcl_fast.profile.usage import cpu_seconds, idle_seconds, memory_in_use

DECODE_ALONE = 0
"""In the place of a number of views: each image is decoded, and next to nothing made of it."""


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
    """One measurement: images a second; cores that the loader kept busy, and that nobody used.

    `memory` is in bytes, beyond those before; `warmup` is in seconds, until the clock ran.
    """

    images: float
    cores: float
    idle: float
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
            started, cpu, nobody = time.perf_counter(), cpu_seconds(), idle_seconds()
            _pull(batches, window.batches, device)
            seconds, busy = time.perf_counter() - started, cpu_seconds() - cpu
            idle = idle_seconds() - nobody
            memory = max(0, memory_in_use() - before)
        images = window.batches * window.batch_size / seconds
        return Sample(images, busy / seconds, idle / seconds, memory, started - began)

    @property
    def images(self) -> float:
        """Images a second, the median."""
        return statistics.median(sample.images for sample in self.samples)

    @property
    def cores(self) -> float:
        """Cores that the loader kept busy, the median."""
        return statistics.median(sample.cores for sample in self.samples)

    @property
    def idle(self) -> float:
        """Cores that nobody used, the median."""
        return statistics.median(sample.idle for sample in self.samples)

    @property
    def cpu(self) -> float:
        """Seconds of processor time an image, the median: others who use the machine change it little."""
        return statistics.median(sample.cores / sample.images for sample in self.samples)


def interleave(contenders: Sequence[Contender], repeats: int, window: Window, device: torch.device) -> None:
    """Measure each in turn, `repeats` times, so that a drift of the machine's speed meets them all."""
    for repeat in range(1, repeats + 1):
        for contender in contenders:
            contender.measure(repeat, window, device)


def _pull(batches: Iterator[Any], count: int, device: torch.device) -> None:
    for _ in range(count):
        next(batches)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
