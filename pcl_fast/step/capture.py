"""Steps as replays of a CUDA graph, captured by hand, with the plain calls where that cannot be.

The first calls of a kind run as they are, on the stream that captures, so that libraries choose their kernels
and torch its memory; then one is captured, and all later ones are replays. Every call is a real step.
"""

import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch

from pcl_fast.step.obstacles import find_obstacle
from pcl_fast.streams import Fork

WARMUP = 3  # plain calls before a capture

Call = Callable[[], None]
Say = Callable[[str], None]


class PlainCalls:
    """Makes the calls as they are."""

    def run(self, calls: Sequence[Call], key: Hashable) -> None:
        """Make each of the calls once."""
        for call in calls:
            call()

    def close(self) -> None:
        """Nothing is held."""


class CapturedCalls:
    """Replays a graph of the calls for each `key`: same key, same calls and same shapes.

    Several calls run side by side. `say` is told when a graph is made, and why if none can be; the calls are
    then made as they are. `compiled` calls are not searched for what no graph can hold.
    """

    def __init__(self, device: torch.device, say: Say, compiled: bool = False) -> None:
        self._device, self._say, self._compiled = device, say, compiled
        self._stream = torch.cuda.Stream(device)
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._warm: dict[Hashable, int] = {}
        self._forks: dict[int, Fork] = {}
        self.refused: str | None = None

    def run(self, calls: Sequence[Call], key: Hashable) -> None:
        """Make each of the calls once: by a replay, if there is a graph of them."""
        graph = self._graphs.get(key)
        if graph is None and self.refused is None and self._warm.get(key, 0) >= WARMUP:
            graph = self._capture(calls, key)
        if graph is not None:
            graph.replay()
        else:
            self._run_plainly(calls, key)

    def _run_plainly(self, calls: Sequence[Call], key: Hashable) -> None:
        """On the stream that captures, the last time before with an eye on what no graph can hold."""
        self._warm[key] = self._warm.get(key, 0) + 1
        last = self._warm[key] == WARMUP and self.refused is None and not self._compiled
        here = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            if last:
                obstacle = find_obstacle(lambda: self._side_by_side(calls))
                if obstacle is not None:
                    self._refuse(obstacle)
            else:
                self._side_by_side(calls)
        here.wait_stream(self._stream)

    def _capture(self, calls: Sequence[Call], key: Hashable) -> torch.cuda.CUDAGraph | None:
        """Capture without running. None if that fails, which changes nothing but this object."""
        torch.cuda.empty_cache()  # as a capture does first: what plain calls have left is none of its memory
        before, began = torch.cuda.memory_reserved(self._device), time.perf_counter()
        graph = torch.cuda.CUDAGraph()
        mode = "thread_local"
        try:
            # The stream twice: some versions of torch do not leave it where a capture fails.
            with (
                torch.cuda.stream(self._stream),
                torch.cuda.graph(graph, stream=self._stream, capture_error_mode=mode),
            ):
                self._side_by_side(calls)
        except Exception as error:  # whatever CUDA, torch or a user's network makes of it
            torch.cuda.synchronize(self._device)
            self._refuse(first_line(error))
            return None
        self._graphs[key] = graph
        mebibytes = (torch.cuda.memory_reserved(self._device) - before) / 2**20
        seconds = time.perf_counter() - began
        self._say(f"the step is one CUDA graph now: captured in {seconds:.1f} s, {mebibytes:,.0f} MiB")
        return graph

    def _side_by_side(self, calls: Sequence[Call]) -> None:
        if len(calls) not in self._forks:
            self._forks[len(calls)] = Fork(self._device, len(calls) - 1)
        self._forks[len(calls)](calls)

    def _refuse(self, reason: str) -> None:
        self.refused = reason
        way = "compiled" if self._compiled else "eager"
        self._say(f"the step cannot be captured in a CUDA graph ({reason}); it goes on {way}")

    def close(self) -> None:
        """Free the graphs, and the memory that only they use."""
        torch.cuda.synchronize(self._device)
        for graph in self._graphs.values():
            graph.reset()
        self._graphs.clear()


def make_calls(capture: str, device: torch.device, say: Say, compiled: bool) -> PlainCalls | CapturedCalls:
    """How steps are called where `--capture` is `capture`, resolved: on or off."""
    if capture == "on":
        return CapturedCalls(device, say, compiled)
    return PlainCalls()


def first_line(error: BaseException) -> str:
    """What went wrong first, in a line: errors of a capture hide the one that broke it."""
    root: Any = error
    while (inner := root.__cause__ or root.__context__) is not None:
        root = inner
    text = str(root).strip()
    return text.splitlines()[0] if text else type(root).__name__
