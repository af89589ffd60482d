"""A polite stop: Ctrl-C, SIGTERM and SIGUSR1 are noted, and served between two steps."""

import signal
from types import FrameType
from typing import Self

SERVED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopSignal:
    """Within this context the first signal only sets `received`; a second Ctrl-C stops at once."""

    received: str | None = None

    def __enter__(self) -> Self:
        """Take over the signals."""
        self._before = {number: signal.signal(number, self._note) for number in SERVED}
        return self

    def __exit__(self, *_: object) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name
