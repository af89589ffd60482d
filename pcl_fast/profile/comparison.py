"""Variants of a training step measured against each other: their data, their computing, both together."""

import contextlib
import math
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from pcl_fast.config import Config
from pcl_fast.contract import TrainLoader
from pcl_fast.profile.binding import Rates
from pcl_fast.profile.timing import Timed, Timing, synchronize, time_interleaved
from pcl_fast.profile.trace import KernelCounts, count_kernels, write_trace
from pcl_fast.profile.usage import PeakMemory
from pcl_fast.profile.variants import BASELINES, Variant, describe, open_loading, open_variant

SAMPLE_SECONDS = {"cpu": 0.4, "cuda": 1.0}  # of work in a sample, unless told how many steps
KEEPS_UP = 1.5  # data this many times as fast as training never run out, however many were made ahead
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Source:
    """A variant's own loader; up to `ahead` batches are made before they are asked for."""

    loader: TrainLoader
    ahead: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How to measure: samples of each, steps of a sample (None: enough), steps before the clock.

    `trace`: a file for what a few steps of the fastest of ours do.
    """

    repeats: int
    steps: int | None
    warmup: int
    trace: Path | None = None


@dataclass(slots=True, kw_only=True)
class Row:
    """What was found of a variant; `refused` says why nothing was, or no more.

    `compute`, `data` and `end_to_end` are of a step on noise, of the making of its batch, and of both as in
    training; `warmup` is in seconds, `memory` in bytes, both of the step on noise.
    """

    name: str
    about: str
    batch_size: int
    refused: str | None = None
    said: list[str] = field(default_factory=list[str])
    warmup: float | None = None
    memory: int | None = None
    compute: Timing | None = None
    data: Timing | None = None
    end_to_end: Timing | None = None
    counts: KernelCounts | None = None

    @property
    def is_ours(self) -> bool:
        """Whether it is none of the baselines."""
        return self.name not in BASELINES

    @property
    def step(self) -> Timing | None:
        """Of a step as in training, if there were data, else on noise; None if it could not be."""
        timing = self.end_to_end or self.compute
        return None if self.refused else timing

    @property
    def rates(self) -> Rates | None:
        """Images a second, if all three were measured."""
        if self.refused or not (self.compute and self.data and self.end_to_end):
            return None
        seconds = self.end_to_end.median, self.compute.median, self.data.median
        return Rates(*(self.batch_size / each for each in seconds))


def compare(
    config: Config, names: Sequence[str], sources: Mapping[str, Source], plan: Plan, say: Say
) -> list[Row]:
    """Measure variants of a resolved configuration in turn; those that cannot be are left out, and say why.

    `sources` has one for each name; without any, only computing is measured. `say` is told how it goes on.
    Raises what a loader raises.
    """
    # Each part opens and closes its variants: what all hold at once need not fit into memory.
    bench = _Bench(config, plan, say)
    rows = [Row(name=n, about=describe(n, config), batch_size=config.train.batch_size) for n in names]
    for row in rows if sources else ():
        bench.measure_data(row, sources[row.name])
    bench.measure_compute(rows, last=not sources)
    if sources:
        bench.measure_training(rows, sources)
    return rows


def fastest_of_ours(rows: Sequence[Row]) -> Row | None:
    """The one of ours with the shortest step, in training where that was measured."""
    ours = [(row.step.median, row) for row in rows if row.is_ours and row.step]
    return min(ours, key=lambda pair: pair[0])[1] if ours else None


@dataclass(frozen=True, slots=True)
class _Bench:
    """Opens variants, times them and closes them."""

    config: Config
    plan: Plan
    say: Say

    def measure_data(self, row: Row, source: Source) -> None:
        """Time the making of batches, a variant at a time: others' workers would be in the way."""
        with self._opened([row], lambda name: open_loading(name, self.config, source.loader)) as variants:
            for variant in variants.values():
                self._pace(variant, source.ahead)
            found = self._time("data alone", variants, {row.name: source.ahead})
        row.data = found.get(row.name)

    def measure_compute(self, rows: Sequence[Row], last: bool) -> None:
        """Time steps on one batch of noise."""
        with self._opened(rows, lambda name: open_variant(name, self.config), remember=True) as variants:
            found = self._time("computing alone", variants, {})
            self._check(rows, variants)
            for row in rows:
                row.compute = found.get(row.name)
            if last:
                self._look_inside(rows, variants)

    def measure_training(self, rows: Sequence[Row], sources: Mapping[str, Source]) -> None:
        """Time steps with their data."""
        loaders = {name: source.loader for name, source in sources.items()}
        with self._opened(rows, lambda name: open_variant(name, self.config, loaders[name])) as variants:
            crowded = any(source.ahead for source in sources.values())
            # A step for what the workers of the one before are still at; and, where data might run out, for
            # what its own have made ahead while others were measured.
            lead = {row.name: crowded + (sources[row.name].ahead if _may_run_out(row) else 0) for row in rows}
            found = self._time("training", variants, lead)
            self._check(rows, variants)
            for row in rows:
                row.end_to_end = found.get(row.name)
            self._look_inside(rows, variants)

    @contextlib.contextmanager
    def _opened(
        self, rows: Sequence[Row], make: Callable[[str], Variant], remember: bool = False
    ) -> Generator[dict[str, Variant]]:
        """Those that can be, warm; `remember` what that took. Closed with the block."""
        device = torch.device(self.config.device)
        variants: dict[str, Variant] = {}
        with contextlib.ExitStack() as stack:
            for row in rows:
                if row.refused:
                    continue
                memory = PeakMemory(device)
                variant = make(row.name)
                stack.callback(variant.close)
                seconds = variant.warm_up(self.plan.warmup)
                row.refused = variant.refused
                if row.refused:
                    variant.close()
                    self.say(f"{row.name} is left out: {row.refused}")
                    continue
                variants[row.name] = variant
                if remember:
                    row.warmup, row.memory, row.said = seconds, memory.read(), list(variant.said)
                    self.say(f"{row.name}: warm after {seconds:.1f} s")
            yield variants

    def _time(self, what: str, variants: Mapping[str, Variant], lead: Mapping[str, int]) -> dict[str, Timing]:
        timed = {
            name: Timed(variant.step, self._steps(variant), lead.get(name, 0))
            for name, variant in variants.items()
        }
        steps = ", ".join(f"{name} {each.steps}" for name, each in timed.items())
        self.say(f"{what}: {self.plan.repeats} times in turn, steps each time: {steps or 'none'}")
        return time_interleaved(timed, torch.device(self.config.device), self.plan.repeats)

    def _pace(self, variant: Variant, ahead: int) -> None:
        """Look how long a step takes when nothing is left of what was made ahead."""
        for steps in (ahead, ahead):
            began = time.perf_counter()
            for _ in range(steps):
                variant.step()
            synchronize(variant.device)
            variant.step_seconds = (time.perf_counter() - began) / steps if steps else variant.step_seconds

    def _steps(self, variant: Variant) -> int:
        if self.plan.steps is not None:
            return self.plan.steps
        return max(1, math.ceil(SAMPLE_SECONDS[variant.device.type] / max(variant.step_seconds, 1e-6)))

    def _check(self, rows: Sequence[Row], variants: Mapping[str, Variant]) -> None:
        """Refuse those whose steps have broken."""
        for row in rows:
            if row.name in variants:
                variants[row.name].check()
                row.refused = variants[row.name].refused

    def _look_inside(self, rows: Sequence[Row], variants: Mapping[str, Variant]) -> None:
        """Count what a step starts, and draw the fastest; last, as profilers may leave something behind."""
        device = torch.device(self.config.device)
        for row in rows:
            if row.name in variants:
                for _ in range(2):  # the profiler is at hand from the first time on
                    row.counts = count_kernels(variants[row.name].step, device)
        fastest = fastest_of_ours(rows)
        if fastest is not None and self.plan.trace is not None:
            write_trace(self.plan.trace, variants[fastest.name].step, device)


def _may_run_out(row: Row) -> bool:
    return bool(row.data and row.compute and row.compute.median < KEEPS_UP * row.data.median)
