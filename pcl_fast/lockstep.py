"""Several runs in one process, a step of each side by side."""

import contextlib
from collections.abc import Callable, Generator, Hashable, Sequence
from typing import Protocol

from pcl_fast.errors import PclError, Preempted
from pcl_fast.signals import StopSignal
from pcl_fast.step.capture import CapturedCalls, PlainCalls


class Run(Protocol):
    """A run that leaves its device's part to be called by others."""

    stop: StopSignal

    @property
    def steps_done(self) -> int:
        """Steps that are done."""
        ...

    @property
    def device_step(self) -> Callable[[], None]:
        """The device's part of a step."""
        ...

    def steps(self) -> Generator[Hashable]:
        """The host's part: yields where `device_step` is due, with the shape of its batch."""
        ...

    def say(self, message: str) -> None:
        """Tell whoever looks at this run."""
        ...


def run_together(
    runs: Sequence[Run], calls: PlainCalls | CapturedCalls, stop: StopSignal | None = None
) -> None:
    """Make every run to its end; those that lag behind catch up first.

    A run that fails ends alone, and its error is raised when all have ended. After a signal each saves and
    ends, and Preempted is raised. Signals are those of `stop`, if somebody listens already.
    """
    with contextlib.closing(calls), contextlib.ExitStack() as stack:
        lockstep = _Lockstep(runs, stop or stack.enter_context(StopSignal()))
        with contextlib.closing(lockstep):
            while group := lockstep.next_group():
                key = tuple((id(run), lockstep.shapes[run]) for run in group)
                calls.run([run.device_step for run in group], key)
                for run in group:
                    lockstep.go_on(run)
    if lockstep.errors:
        stops = [error for error in lockstep.errors if isinstance(error, Preempted)]
        raise (stops or lockstep.errors)[0]


def to_all(runs: Sequence[Run]) -> Callable[[str], None]:
    """What tells all of them."""

    def say(message: str) -> None:
        for run in runs:
            run.say(message)

    return say


class _Lockstep:
    """The runs that are not at their end, each waiting for a step on a batch of one of `shapes`."""

    def __init__(self, runs: Sequence[Run], stop: StopSignal) -> None:
        self.shapes: dict[Run, Hashable] = {}
        self.errors: list[PclError] = []
        self._parts: dict[Run, Generator[Hashable]] = {}
        self._several = len(runs) > 1
        for run in runs:
            run.stop = stop
            self._parts[run] = run.steps()
            self.go_on(run)

    def next_group(self) -> list[Run]:
        """Those that have done the fewest steps; none when all are at their end."""
        least = min((run.steps_done for run in self._parts), default=0)
        return [run for run in self._parts if run.steps_done == least]

    def go_on(self, run: Run) -> None:
        """Let a run do its host's part up to the next step, or to its end."""
        try:
            self.shapes[run] = next(self._parts[run])
        except StopIteration:
            del self._parts[run]
        except PclError as error:
            del self._parts[run]
            self.errors.append(error)
            if self._several and not isinstance(error, Preempted):
                run.say(f"this run ends here, the others go on: {error}")

    def close(self) -> None:
        """End what runs hold that something else than themselves has stopped."""
        for part in self._parts.values():
            part.close()
