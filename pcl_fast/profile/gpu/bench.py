"""What a part measures with: a device and its clock, CUDA graphs, and a place for its rows."""

import contextlib
import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, TypeVar

import torch

from pcl_fast.config import Config
from pcl_fast.contract import DeviceLoader
from pcl_fast.profile.ceilings import ASSUMED_KERNEL, Ceilings
from pcl_fast.step.capture import first_line

Call = Callable[[], object]
Row = dict[str, Any]
Size = TypeVar("Size")

MOST_CALLS = 10_000  # in a sample
WARMUPS = 2  # of what is captured
UNKNOWN = Ceilings("unknown", 790e12, 4.3e12, ASSUMED_KERNEL, "as published of an H200")


class OpenLoader(Protocol):
    """Opens random images that lie on the device, as a data set for training a configuration."""

    def __call__(self, config: Config, num_views: int) -> DeviceLoader:
        """Views are made anew at every step, as of real images."""
        ...


@dataclass(frozen=True, kw_only=True)
class Bench:
    """One part's device and rows.

    A time is taken `samples` times, each over enough calls to last `seconds`. `tiny`: sizes that only show
    that everything runs, without a GPU too. `left` is how many seconds the part has from its start.
    """

    device: torch.device
    add: Callable[[Row], None]
    open_loader: OpenLoader
    ceilings: Ceilings = UNKNOWN
    samples: int = 10
    seconds: float = 0.05
    tiny: bool = False
    left: float = math.inf
    began: float = field(default_factory=time.monotonic)

    @property
    def best_mode(self) -> str:
        """How a step is made: captured, where there are CUDA graphs."""
        return "captured" if self.device.type == "cuda" else "eager"

    def pick(self, full: Sequence[Size], tiny: Sequence[Size]) -> Sequence[Size]:
        """The sizes to measure."""
        return tiny if self.tiny else full

    def attempt(self, about: Mapping[str, Any], measure: Callable[[], Row]) -> Row | None:
        """Add the row of `about` and what `measure` returns; or of why it failed, and then None.

        What one measurement breaks does not end the part, unless it broke the device.
        """
        try:
            row = {**about, **measure()}
        except Exception as error:  # whatever torch, CUDA, Triton or a compiler makes of it
            row = {**about, "failed": _line(error)}
        self.add(row)
        with contextlib.suppress(Exception):  # of a device that is broken
            self._free()
        return None if "failed" in row else row

    def time(self, call: Call) -> list[float]:
        """Seconds of one call, by the device's clock, one value a sample; warmed up before."""
        self.time_calls(call, 1)
        once = self.time_calls(call, 2)
        count = max(1, min(MOST_CALLS, math.ceil(self.seconds / max(once, 1e-9))))
        return [self.time_calls(call, count) for _ in range(self.samples)]

    def time_graph(self, calls: Sequence[Call], least: int = 1) -> list[float]:
        """Seconds of one of the calls, made one after the other in a CUDA graph, `least` times at least.

        Elsewhere than on a GPU they are made as they are.
        """
        calls = list(calls) * math.ceil(least / len(calls))
        seconds = self.time(self.graph(calls))
        return [each / len(calls) for each in seconds]

    def time_calls(self, call: Call, count: int) -> float:
        """Seconds of one of `count` calls, by the device's clock, without a warm-up."""
        if self.device.type != "cuda":
            began = time.perf_counter()
            for _ in range(count):
                call()
            return (time.perf_counter() - began) / count
        torch.cuda.synchronize(self.device)
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(count):
            call()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3 / count

    def graph(self, calls: Sequence[Call]) -> Callable[[], None]:
        """A replay of all calls in a CUDA graph, warmed up before; elsewhere than on a GPU the calls."""
        if self.device.type != "cuda":
            return partial(_make_all, calls)
        here, stream = torch.cuda.current_stream(self.device), torch.cuda.Stream(self.device)
        stream.wait_stream(here)
        with torch.cuda.stream(stream):
            for _ in range(WARMUPS):
                _make_all(calls)
        here.wait_stream(stream)
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        # `stream` twice: a capture that fails does not go back to the stream of before.
        with torch.cuda.stream(stream), torch.cuda.graph(graph, stream=stream):
            _make_all(calls)
        return partial(_replay, graph, calls)

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Through torch.compile, for one shape; tiny, without making code of it."""
        torch.compiler.reset()  # else, after some shapes, it is left as it is
        return torch.compile(function, dynamic=False, backend="aot_eager" if self.tiny else "inductor")

    def seconds_left(self) -> float:
        """Until this part is ended."""
        return self.began + self.left - time.monotonic()

    def _free(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _make_all(calls: Sequence[Call]) -> None:
    for call in calls:
        call()


def _replay(graph: torch.cuda.CUDAGraph, _held: Sequence[Call]) -> None:
    """The graph reads the memory of tensors that only its calls hold."""
    graph.replay()


def _line(error: BaseException) -> str:
    """The kind of an error, and the first line of what went wrong first."""
    return f"{type(error).__name__}: {first_line(error)}"[:300]
