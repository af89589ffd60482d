"""Honest timing: warmed up outside the clock, variants in turn, medians and spread, ratios pair by pair."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Timed:
    """What is timed: `steps` calls a sample, after `lead` calls before the clock starts."""

    call: Callable[[], object]
    steps: int
    lead: int = 0


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one step, one value a repeat, each the mean of `steps`.

    `ratio` to the reference: how many times as fast, the median over pairs of repeats.
    """

    seconds: list[float]
    steps: int
    ratio: float
    ratio_spread: tuple[float, float]

    @property
    def median(self) -> float:
        """Seconds a step."""
        return statistics.median(self.seconds)


def time_interleaved(timed: Mapping[str, Timed], device: torch.device, repeats: int) -> dict[str, Timing]:
    """Time each in turn, `repeats` times; all are warmed up.

    The first is the reference of the ratios: another's ratio says how many times as fast it is, by the
    median of the repeats' ratios and their smallest and largest, so that a drift of the machine's speed
    cancels.
    """
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(repeats):
        for name, each in timed.items():
            seconds[name].append(_time(each, device))
    reference = next(iter(seconds.values()), [])
    timings: dict[str, Timing] = {}
    for name, own in seconds.items():
        ratios = [theirs / ours for theirs, ours in zip(reference, own, strict=True)]
        spread = min(ratios), max(ratios)
        timings[name] = Timing(own, timed[name].steps, statistics.median(ratios), spread)
    return timings


def _time(timed: Timed, device: torch.device) -> float:
    for _ in range(timed.lead):
        timed.call()
    synchronize(device)
    began = time.perf_counter()
    for _ in range(timed.steps):
        timed.call()
    synchronize(device)
    return (time.perf_counter() - began) / timed.steps


def synchronize(device: torch.device) -> None:
    """Wait until the device has done everything it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
