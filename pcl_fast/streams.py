"""Independent work side by side on one GPU; one thing after the other elsewhere."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

Result = TypeVar("Result")


class Fork:
    """Runs independent tasks on streams of their own, and joins them again.

    Each task begins after what the calling stream was given before, and what it is given later waits for
    all tasks; so blocks that one task frees are used again only by what comes after the join or in the same
    stream. Backward passes follow by themselves: autograd runs each operation where its forward ran.
    Under capture the streams become branches of the graph.
    """

    def __init__(self, device: torch.device, width: int) -> None:
        self._streams = [torch.cuda.Stream(device) for _ in range(width)] if device.type == "cuda" else []

    def __call__(self, tasks: Sequence[Callable[[], Result]]) -> list[Result]:
        """The tasks' results, in their order. The last one runs on the calling stream."""
        if not self._streams or len(tasks) == 1:
            return [task() for task in tasks]
        assert len(tasks) <= len(self._streams) + 1, "a stream for each task but the last"
        here = torch.cuda.current_stream(self._streams[0].device)
        results: list[Result] = []
        for task, stream in zip(tasks[:-1], self._streams, strict=False):
            stream.wait_stream(here)
            with torch.cuda.stream(stream):
                results.append(task())
        results.append(tasks[-1]())
        for stream in self._streams[: len(tasks) - 1]:
            here.wait_stream(stream)
        return results
