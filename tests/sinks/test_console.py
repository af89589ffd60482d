"""What a person sees: plain lines in a log, a live display in a terminal."""

import dataclasses
import io
import threading
import time
from collections.abc import Callable

import pytest
from rich.console import Console

from pcl_fast.sinks import LiveConsole, PlainConsole, console
from pcl_fast.sinks.console import clock
from tests.sinks.history import INFO, make_record, make_run


class Clock:
    """Time that passes only when told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(console.time, "monotonic", lambda: self.now)


def plain() -> tuple[PlainConsole, io.StringIO]:
    out = io.StringIO()
    return PlainConsole(Console(file=out, width=60)), out


def test_plain_lines_are_whole_and_hold_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    passing = Clock(monkeypatch)
    sink, out = plain()
    sink.started(INFO)
    for step in range(1, 11):
        passing.now += 2
        sink.stepped(step)
    sink.recorded(make_record("epoch", 0, 10))
    sink.said("[red] is not markup: /a/path/that/is/long/" + 100 * "x")
    sink.closed()
    lines = out.getvalue().splitlines()
    assert len(lines) == 3, "a line each, however narrow the log"
    assert lines[0] == "pcl seed 0: 3 epochs of 10 steps, in runs/x"
    assert "pcl seed 0  epoch 1/3  loss 8.225 (ce 2.200 pe 0.188 pm 0.625)  train 40.0%" in lines[1]
    assert "PCL 60.25%  PCL-E 65.75%  12,346 img/s  left 0:40" in lines[1], "20 steps of 2 s"
    assert lines[2].startswith("[red] is not markup")
    assert "\x1b" not in out.getvalue()


def test_an_epoch_without_a_step_of_this_process_has_no_rate() -> None:
    """A run that goes on from the end of an epoch evaluates it, and trained nothing of it."""
    sink, out = plain()
    sink.started(INFO)
    sink.recorded(make_record("epoch", 0, 10) | {"images_per_second": 0.0})
    assert "img/s" not in out.getvalue()
    assert "PCL-E 65.75%  left" in out.getvalue()


def test_steps_are_printed_only_after_half_a_minute_of_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    passing = Clock(monkeypatch)
    sink, out = plain()
    sink.started(INFO)
    shown: list[int] = []
    for step in range(1, 10):
        passing.now += 20
        sink.stepped(step)
        before = len(out.getvalue())
        sink.recorded(make_record("step", 0, step))
        if len(out.getvalue()) > before:
            shown.append(step)
    assert shown == [2, 4, 6, 8]
    assert "epoch 1/3 step 2/30" in out.getvalue()
    assert "PCL" not in out.getvalue(), "nothing was evaluated"


def test_a_resumed_run_says_where_it_goes_on_and_times_only_its_own_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    passing = Clock(monkeypatch)
    sink, out = plain()
    sink.started(dataclasses.replace(INFO, first_step=20, first_record=4))
    passing.now += 30
    sink.stepped(25)
    sink.recorded(make_record("epoch", 2, 25))
    assert "resuming after step 20 of 30" in out.getvalue()
    assert "left 0:30" in out.getvalue(), "5 steps in 30 s, 5 more to do"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (61, "1:01"), (3599, "59:59"), (36061, "10:01:01")]
)
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text


def live(width: int = 140, get_time: Callable[[], float] = time.monotonic) -> tuple[LiveConsole, Console]:
    terminal = Console(
        file=io.StringIO(), record=True, force_terminal=True, width=width, height=40, get_time=get_time
    )
    return LiveConsole(terminal), terminal


def threads_end(count: int) -> bool:
    deadline = time.monotonic() + 10
    while threading.active_count() > count and time.monotonic() < deadline:
        time.sleep(0.01)
    return threading.active_count() == count


def test_the_live_display_shows_terms_throughput_accuracies_and_time_left() -> None:
    threads, now = threading.active_count(), [100.0]
    sink, terminal = live(get_time=lambda: now[0])
    sink.started(INFO)
    for step in range(1, 11):
        now[0] += 2
        sink.stepped(step)
    for record in make_run(1):
        sink.recorded(record)
    sink.said("a message")
    sink.closed()
    assert threads_end(threads), "the display's thread is still there"
    shown = terminal.export_text()
    assert "pcl seed 0: 3 epochs of 10 steps, in runs/x" in shown
    assert "a message" in shown
    last = shown[max(shown.rindex("10/30") - 200, 0) :]
    assert "12,346 img/s" in last
    assert "0:00:20 left 0:00:40" in last, "10 steps of 2 s done, 20 to do"
    rows = {line.split()[0]: line.split()[1:] for line in last.splitlines() if line.split()}
    assert rows["ce"] == ["pe", "pm", "train", "top-1"]
    assert rows["peer1"] == ["2.2500", "0.1250", "0.5000", "31.2%"]
    assert rows["peer2"] == ["2.3500", "0.2500", "0.7500", "32.5%"]
    assert rows["ensemble"] == ["2.0000", "40.0%"]
    assert rows["w"] == ["0.432", "phi", "0.9876", "lr", "0.025"]
    assert "PCL 60.25%  PCL-E 65.75%" in last


def test_the_network_alone_has_no_distillation_to_show() -> None:
    sink, terminal = live()
    sink.started(INFO)
    sink.recorded(make_run(1)[0] | {"terms": {"ce/peer1": 2.0}, "train_top1": {"peer1": 31.2}})
    sink.closed()
    shown = terminal.export_text()
    assert "lr 0.025" in shown
    assert "phi" not in shown


def test_the_live_display_of_a_resumed_run_begins_where_it_was() -> None:
    sink, terminal = live()
    sink.started(dataclasses.replace(INFO, first_step=20))
    sink.closed()
    shown = terminal.export_text()
    assert "resuming after step 20 of 30" in shown
    assert "20/30" in shown


def test_a_narrow_terminal_breaks_nothing() -> None:
    sink, terminal = live(width=30)
    sink.started(INFO)
    for record in make_run(2):
        sink.recorded(record)
    sink.closed()
    shown = terminal.export_text()
    assert "8.225" in shown
    assert max(len(line) for line in shown.splitlines()) <= 30
