"""Ctrl-C, SIGTERM and SIGUSR1 become a note to read between two steps."""

import os
import signal

import pytest

from pcl_fast.signals import StopSignal

SERVED = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]


@pytest.mark.parametrize("number", SERVED)
def test_the_first_signal_is_noted_by_name(number: signal.Signals) -> None:
    with StopSignal() as stop:
        assert stop.received is None
        os.kill(os.getpid(), number)
        assert stop.received == number.name


def test_a_second_ctrl_c_stops_at_once() -> None:
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.received == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_scheduler_that_repeats_itself_does_not_break_the_save() -> None:
    with StopSignal() as stop:
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert stop.received in ("SIGUSR1", "SIGTERM")


@pytest.mark.parametrize("error", [None, ValueError])
def test_the_handlers_of_before_come_back(error: type[Exception] | None) -> None:
    seen: list[int] = []
    mine = signal.signal(signal.SIGUSR1, lambda number, _: seen.append(number))
    before = [signal.getsignal(number) for number in SERVED]
    try:
        try:
            with StopSignal():
                if error is not None:
                    raise error
        except ValueError:
            assert error is ValueError
        assert [signal.getsignal(number) for number in SERVED] == before
        os.kill(os.getpid(), signal.SIGUSR1)
        assert seen == [signal.SIGUSR1]
    finally:
        signal.signal(signal.SIGUSR1, mine)
