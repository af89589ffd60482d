"""Steps of several runs in turn: who is called with whom, and what a failure leaves to the others."""

from collections.abc import Callable, Generator, Hashable, Sequence
from dataclasses import dataclass, field

import pytest

from pcl_fast.errors import PclError
from pcl_fast.lockstep import run_together
from pcl_fast.signals import StopSignal
from pcl_fast.step.capture import PlainCalls


@dataclass(eq=False)
class Walk:
    """A run of which only the order of its steps is of interest; its last batch is a small one."""

    name: str
    steps_done: int
    last: int
    log: list[str]
    fails_at: int | None = None
    stop: StopSignal = field(default_factory=StopSignal)

    def device_step(self) -> None:
        self.log.append(f"{self.name}{self.steps_done + 1}")

    def steps(self) -> Generator[int]:
        while self.steps_done < self.last:
            yield 8 if self.steps_done < self.last - 1 else 3
            self.steps_done += 1
            if self.steps_done == self.fails_at:
                raise PclError(self.name)

    def say(self, message: str) -> None:
        self.log.append(message)


class Keyed(PlainCalls):
    """Plain calls that note how many there are together, and by which key."""

    def __init__(self) -> None:
        self.keys: list[tuple[int, Hashable]] = []

    def run(self, calls: Sequence[Callable[[], None]], key: Hashable) -> None:
        self.keys.append((len(calls), key))
        super().run(calls, key)


def test_a_key_stands_for_the_same_runs_and_the_same_sizes() -> None:
    """A graph is replayed by it: another group, or another size of batch, needs another graph."""
    log: list[str] = []
    calls, runs = Keyed(), [Walk("a", 0, 6, log), Walk("b", 2, 6, log)]
    run_together(runs, calls)
    assert log == ["a1", "a2", "a3", "b3", "a4", "b4", "a5", "b5", "a6", "b6"]
    assert [count for count, _ in calls.keys] == [1, 1, 2, 2, 2, 2]
    keys = [key for _, key in calls.keys]
    assert [keys.index(key) for key in keys] == [0, 0, 2, 2, 2, 5]


def test_runs_one_after_the_other_share_no_key() -> None:
    log: list[str] = []
    calls, runs = Keyed(), [Walk("a", 0, 2, log), Walk("b", 2, 4, log)]
    run_together(runs, calls)
    assert log == ["a1", "a2", "b3", "b4"]
    assert len({key for _, key in calls.keys}) == 4


@pytest.mark.parametrize("fails_at", [1, 3, 6])
def test_others_go_on_after_a_failure_wherever_it_is(fails_at: int) -> None:
    log: list[str] = []
    runs = [Walk("a", 0, 6, log), Walk("b", 0, 6, log, fails_at), Walk("c", 0, 6, log)]
    with pytest.raises(PclError, match=r"^b$"):
        run_together(runs, PlainCalls())
    steps = [word for word in log if word[1:].isdigit()]
    assert steps == [f"{n}{k}" for k in range(1, 7) for n in "abc" if n != "b" or k <= fails_at]
    assert [word for word in log if word not in steps] == ["this run ends here, the others go on: b"]


def test_a_run_alone_that_fails_says_nothing_of_others() -> None:
    log: list[str] = []
    with pytest.raises(PclError, match=r"^a$"):
        run_together([Walk("a", 0, 6, log, 2)], PlainCalls())
    assert log == ["a1", "a2"]
