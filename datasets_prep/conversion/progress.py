"""Showing how far a conversion is: a bar with images/s and the time left, or a line every tenth."""

import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

LINES = 10


class RateColumn(ProgressColumn):
    """Images a second."""

    def render(self, task: Task) -> Text:
        """The rate of the last while."""
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.0f} images/s" if speed else "", style="progress.data.speed")


@contextmanager
def image_progress(title: str, first: int, total: int) -> Generator[Callable[[int], None]]:
    """Yield a function to call with the images done so far; `first` were done before."""
    if not sys.stderr.isatty():
        yield _lines(title, first, total)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        RateColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns, console=Console(stderr=True), speed_estimate_period=10.0) as progress:
        task = progress.add_task(title, total=total, completed=first)

        def draw(done: int) -> None:
            if done != progress.tasks[0].completed:
                progress.update(task, completed=done)

        yield draw


def _lines(title: str, first: int, total: int) -> Callable[[int], None]:
    started, told = time.monotonic(), LINES * first // total

    def tell(done: int) -> None:
        nonlocal told
        if LINES * done // total <= told:
            return
        told = LINES * done // total
        rate = (done - first) / max(time.monotonic() - started, 1e-9)
        left = (total - done) / rate
        sys.stderr.write(
            f"{title}: {done:,} of {total:,} images, {rate:,.0f} images/s, {format_seconds(left)} left\n"
        )
        sys.stderr.flush()

    return tell


def format_seconds(seconds: float) -> str:
    """A duration as 12 s, 3:05 or 1:02:03."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes}:{rest:02}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
