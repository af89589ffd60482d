"""What happens in a run, told to its sinks."""

import contextlib
from collections.abc import Callable, Sequence

from pcl_fast.sinks import Record, RunInfo, Sink


class Reporter:
    """Tells every sink; one that cannot write does not end the run, but is told of."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = sinks

    def started(self, info: RunInfo) -> None:
        """The run begins or goes on. Raises what a sink raises."""
        for sink in self._sinks:
            sink.started(info)

    def stepped(self, step: int) -> None:
        """A step is done."""
        for sink in self._sinks:
            sink.stepped(step)

    def recorded(self, record: Record) -> None:
        """A new record."""
        self._tell(lambda sink: sink.recorded(record))

    def said(self, message: str) -> None:
        """Something a person should read."""
        for sink in self._sinks:
            with contextlib.suppress(OSError):
                sink.said(message)

    def closed(self) -> None:
        """The run has ended."""
        self._tell(lambda sink: sink.closed())

    def _tell(self, report: Callable[[Sink], None]) -> None:
        for sink in self._sinks:
            try:
                report(sink)
            except OSError as error:
                self.said(f"{type(sink).__name__} could not write ({error}); training goes on")
