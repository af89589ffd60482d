"""The tables that `pcl-fast profile PRESET` prints, and the lines below them."""

from collections.abc import Iterator, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from pcl_fast.commands.profile.preset_report import NOTHING, Findings, headline, number, times, verdict
from pcl_fast.profile.comparison import Row
from pcl_fast.profile.timing import Timing

FASTER = "times as fast|(low-high)"


def print_findings(found: Findings, console: Console) -> None:
    """Two tables, and what they mean in a line each."""
    if any(row.end_to_end for row in found.rows):
        console.print(training_table(found))
    console.print(computing_table(found))
    for line in lines_of(found):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print()


def training_table(found: Findings) -> Table:
    """A row a variant: steps with their data."""
    columns = "ms a|step", "images|/s", "views|/s", "s an|epoch", FASTER, "idle|%", "data|alone"
    table = _table(f"{found.title}: training, with its data", columns)
    table.caption = (
        f"epoch: {found.steps_per_epoch:,} steps, projected from those measured; idle: of the time, waiting "
        "for data; data alone: images/s of the loader"
    )
    for row in found.rows:
        if row.end_to_end is not None and not row.refused:
            rate, rates = found.batch_size / row.end_to_end.median, row.rates
            table.add_row(
                row.name,
                number(1e3 * row.end_to_end.median),
                number(rate),
                number(rate * found.num_views),
                number(found.epoch_seconds(row)),
                _ratio(row.end_to_end),
                number(rates and 100 * rates.waiting),
                number(rates and rates.data),
            )
    return table


def computing_table(found: Findings) -> Table:
    """A row a variant: steps on one batch of noise, and what they take."""
    gpu = found.device_name == "GPU"
    counted = ("laun-|ches", "ker-|nels") if gpu else ("|calls",)
    columns = "ms a|step", "images|/s", FASTER, *counted, "MFU|%", "floor|%", "|GB", "warm-|up s"
    table = _table(f"{found.title}: computing alone, on noise", columns)
    calls = (
        "launches: by the host, in a step with its data" if gpu else "calls: operations of torch in a step"
    )
    table.caption = (
        f"{calls}; floor: the share of {number(1e3 * found.floor.seconds['fused'])} ms, the least by FLOPs "
        "and fused bytes; GB: the most in use"
    )
    for row in found.rows:
        if row.compute is not None and not row.refused:
            seconds = row.compute.median
            table.add_row(
                row.name,
                number(1e3 * seconds),
                number(found.batch_size / seconds),
                _ratio(row.compute),
                *_counts(row, len(counted)),
                number(100 * found.floor.mfu(seconds)),
                number(100 * found.floor.share(seconds)),
                number(row.memory and row.memory / 1e9),
                number(row.warmup),
            )
    return table


def lines_of(found: Findings) -> Iterator[str]:
    """What each variant is or why it is not, what the floor was computed from, the epoch, what binds."""
    for row in found.rows:
        if row.refused:
            yield f"{row.name} was left out: {row.refused}"
        else:
            yield "; ".join([f"{row.name}: {row.about}", *row.said])
    ceilings = found.floor.ceilings
    yield (
        f"floor: a step has {number(found.floor.flops / 1e9)} GFLOP and moves "
        f"{number(found.floor.bytes['fused'] / 1e9)} GB; {ceilings.name}: {number(ceilings.flops / 1e12)} "
        f"TFLOP/s, {number(ceilings.bandwidth / 1e9)} GB/s ({ceilings.source})"
    )
    yield from filter(None, (headline(found), verdict(found)))


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    table.title_justify = table.caption_justify = "left"
    table.add_column("", no_wrap=True)
    for column in columns:
        table.add_column(column.replace("|", "\n"), justify="right", vertical="bottom", no_wrap=True)
    return table


def _ratio(timing: Timing) -> str:
    low, high = timing.ratio_spread
    spread = f" ({times(low)}-{times(high)})" if low < high else ""
    return times(timing.ratio) + spread


def _counts(row: Row, columns: int) -> list[str]:
    counts = [row.counts.launches, row.counts.kernels] if row.counts else [None, None]
    return [NOTHING if count is None else f"{count:,}" for count in counts[:columns]]
