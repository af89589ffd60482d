"""Showing how far a transfer is: a bar on a terminal, a line every tenth elsewhere."""

import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

Report = Callable[[str], None]
Meter = Callable[[int, int | None], None]
"""Called with the bytes that are there, and with how many there will be, if that is known."""


@contextmanager
def transfer_meter(title: str, report: Report) -> Generator[Meter]:
    """Yield a meter for one transfer; without a terminal it reports lines instead of drawing."""
    if not sys.stderr.isatty():
        yield _line_meter(title, report)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(title, total=None)

        def draw(done: int, total: int | None) -> None:
            progress.update(task, completed=done, total=total)

        yield draw


def _line_meter(title: str, report: Report) -> Meter:
    tenths_told = 0

    def tell(done: int, total: int | None) -> None:
        nonlocal tenths_told
        tenths = 10 * done // total if total else 0
        if tenths > tenths_told:
            tenths_told = tenths
            report(f"{title}: {done / 1e6:.1f} of {(total or 0) / 1e6:.1f} MB")

    return tell
