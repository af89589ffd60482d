"""The terminal: a live display for people who watch, plain lines for logs."""

import time

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from pcl_fast.sinks.base import Record, RunInfo

PLAIN_SECONDS = 30.0


class PlainConsole:
    """A line an epoch, and one every half minute within long epochs."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._last = time.monotonic()
        self._rate = Rate()

    def started(self, info: RunInfo) -> None:
        """Say what begins or goes on."""
        self._info = info
        self._rate.begin(info.first_step)
        self.said(f"{info.title}: {describe_start(info)}")

    def stepped(self, step: int) -> None:
        """Count, for the time left."""
        self._rate.step = step

    def recorded(self, record: Record) -> None:
        """Print epochs, and steps if nothing was printed for a while."""
        if record["kind"] == "epoch" or time.monotonic() - self._last > PLAIN_SECONDS:
            left = self._rate.seconds_left(self._info.total_steps)
            self.said(f"{self._info.title}  {record_line(record, self._info)}  left {clock(left)}")

    def said(self, message: str) -> None:
        """Print a message."""
        self.console.print(message, highlight=False, soft_wrap=True, markup=False)
        self._last = time.monotonic()

    def closed(self) -> None:
        """Nothing to close."""


class LiveConsole:
    """A progress bar with throughput and time left, and under it every loss term and accuracy."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._epoch: Record | None = None
        self._step: Record | None = None

    def started(self, info: RunInfo) -> None:
        """Open the display."""
        self._info = info
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=self.console,
        )
        self._task = self._bar.add_task(
            info.title, total=info.total_steps, completed=info.first_step, rate=""
        )
        self.console.print(f"{info.title}: {describe_start(info)}", highlight=False, markup=False)
        self._live = Live(self._render(), console=self.console, refresh_per_second=4)
        self._live.start()

    def stepped(self, step: int) -> None:
        """Move the bar."""
        self._bar.update(self._task, completed=step)

    def recorded(self, record: Record) -> None:
        """Show the newest numbers."""
        if record["kind"] == "epoch":
            self._epoch = record
        else:
            self._step = record
        self._bar.update(self._task, rate=f"{record['images_per_second']:,.0f} img/s")
        self._live.update(self._render())

    def said(self, message: str) -> None:
        """Print a message above the display."""
        self.console.print(message, highlight=False, soft_wrap=True, markup=False)

    def closed(self) -> None:
        """Leave the last state on the screen."""
        self._live.stop()

    def _render(self) -> Group:
        parts: list[Progress | Table | Text] = [self._bar]
        newest = self._step or self._epoch
        if newest is not None:
            parts.append(terms_table(newest))
        if self._epoch is not None:
            parts.append(Text("  last epoch  " + record_line(self._epoch, self._info), overflow="fold"))
        return Group(*parts)


class Rate:
    """Time left, from the steps done since the run began or resumed."""

    def __init__(self) -> None:
        self.begin(0)

    def begin(self, step: int) -> None:
        """Start the clock at `step`."""
        self._began, self._first, self.step = time.monotonic(), step, step

    def seconds_left(self, total: int) -> float:
        """Seconds until `total` steps at the mean pace so far."""
        done = max(self.step - self._first, 1)
        return (time.monotonic() - self._began) / done * (total - self.step)


def describe_start(info: RunInfo) -> str:
    """One line on what starts: its length and folder, or where it goes on."""
    length = f"{info.epochs} epochs of {info.steps_per_epoch} steps, in {info.run_dir}"
    return (
        f"resuming after step {info.first_step} of {info.total_steps}; {length}"
        if info.first_step
        else length
    )


def record_line(record: Record, info: RunInfo) -> str:
    """An epoch's (or some steps') loss, terms, accuracies and throughput in one line."""
    where = f"epoch {record['epoch'] + 1}/{info.epochs}"
    if record["kind"] == "step":
        where += f" step {record['step']}/{info.total_steps}"
    terms = " ".join(f"{kind} {value:.3f}" for kind, value in mean_terms(record).items())
    parts = [
        where,
        f"loss {record['loss']:.3f} ({terms})",
        f"train {max(record['train_top1'].values()):.1f}%",
    ]
    parts += [
        f"{name} {record['val'][head]['top1']:.2f}%"
        for name, head in info.headline.items()
        if "val" in record
    ]
    rate = record["images_per_second"]  # none where a process went on from the end of an epoch
    return "  ".join([*parts, *[f"{rate:,.0f} img/s"] * (rate > 0)])


def mean_terms(record: Record) -> dict[str, float]:
    """The mean over the peers of each kind of term."""
    kinds: dict[str, list[float]] = {}
    for name, value in record["terms"].items():
        kinds.setdefault(name.split("/")[0], []).append(value)
    return {kind: sum(values) / len(values) for kind, values in kinds.items()}


def terms_table(record: Record) -> Table:
    """A row a peer (and the ensemble), a column a kind of term, and its training accuracy."""
    kinds = list(mean_terms(record))
    table = Table(box=None, padding=(0, 2), header_style="dim")
    table.add_column("")
    for name in [*kinds, "train top-1"]:
        table.add_column(name, justify="right")
    for head, top1 in record["train_top1"].items():
        cells = [record["terms"].get(f"{kind}/{head}") for kind in kinds]
        table.add_row(head, *("" if cell is None else f"{cell:.4f}" for cell in cells), f"{top1:.1f}%")
    distils = len(kinds) > 1  # the network alone has one kind of term, and nothing that w and phi apply to
    schedules = f"w {record['distill_weight']:.3f}   phi {record['ema_coefficient']:.4f}   " * distils
    table.caption = f"{schedules}lr {record['lr']:.4g}"
    table.caption_justify = "left"
    return table


def clock(seconds: float) -> str:
    """Seconds as m:ss, or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
