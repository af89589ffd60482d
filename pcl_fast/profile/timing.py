"""Honest timing: warmed up outside the clock, variants in turn, medians and spread, ratios pair by pair."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one step, one value a repeat; `ratio` to the reference, the median over pairs of repeats."""

    seconds: list[float]
    ratio: float
    ratio_spread: tuple[float, float]

    @property
    def median(self) -> float:
        """Seconds a step."""
        return statistics.median(self.seconds)


def time_interleaved(
    steps: Mapping[str, Callable[[], object]],
    device: torch.device,
    repeats: int,
    steps_each: int,
    warmup: int,
) -> dict[str, Timing]:
    """Time each of `steps` in turn, `repeats` times `steps_each` calls, after `warmup` calls of each.

    The first is the reference of the ratios: another's ratio says how many times as fast it is, by the
    median of the repeats' ratios and their smallest and largest, so that a drift of the machine's speed
    cancels.
    """
    for call in steps.values():
        for _ in range(warmup):
            call()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, call in steps.items():
            seconds[name].append(_time(call, device, steps_each))
    reference = next(iter(seconds.values()))
    timings: dict[str, Timing] = {}
    for name, own in seconds.items():
        ratios = [theirs / ours for theirs, ours in zip(reference, own, strict=True)]
        timings[name] = Timing(own, statistics.median(ratios), (min(ratios), max(ratios)))
    return timings


def _time(call: Callable[[], object], device: torch.device, count: int) -> float:
    _wait(device)
    began = time.perf_counter()
    for _ in range(count):
        call()
    _wait(device)
    return (time.perf_counter() - began) / count


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
