"""What `pcl-fast profile data` prints and writes."""

from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from rich import box
from rich.table import Table

from pcl_fast.commands.profile.data_arguments import DataArguments
from pcl_fast.commands.profile.preset import machine
from pcl_fast.profile.loading import DECODE_ALONE, Contender, Window
from pcl_fast.profile.usage import cores_available
from pcl_fast.profile.verdict import shares, verdict

# Of each loader its contenders by their views.
Found = dict[str, dict[int, Contender]]


def results_table(asked: DataArguments, window: Window, found: Found) -> Table:
    """A row for each loader and number of views."""
    title = f"{asked.file}: loaders alone, {asked.threads} workers"
    table = Table(title=title, title_justify="left", caption_justify="left", box=box.SIMPLE)
    for column in ("loader", "views"):
        table.add_column(column, no_wrap=True)
    for column in ("images/s", "low - high", "cores", "ms CPU", "MB", "start"):
        table.add_column(column, justify="right", no_wrap=True)
    table.caption = (
        f"{window.batches} batches of {window.batch_size}, {asked.repeats} times in turn, medians; ms CPU: an"
        " image's; start: seconds to open, compile and make the first batches, not counted; MB: taken by it"
    )
    for name, contenders in found.items():
        for views, contender in contenders.items():
            assert contender.cold is not None
            rates = [sample.images for sample in contender.samples]
            table.add_row(
                name,
                "decode" if views == DECODE_ALONE else str(views),
                f"{contender.images:,.0f}",
                f"{min(rates):,.0f} - {max(rates):,.0f}",
                f"{contender.cores:.1f}",
                f"{1e3 * contender.cpu:.2f}",
                f"{contender.cold.memory / 1e6:,.0f}",
                f"{contender.cold.warmup:.1f}",
            )
        table.add_section()
    return table


def report_of(asked: DataArguments, window: Window, found: Found, left_out: dict[str, str]) -> dict[str, Any]:
    """Everything measured, for a JSON file."""
    loaders = {
        name: {
            "views": {str(views): _figures(contender) for views, contender in contenders.items()},
            "shares": asdict(shares(contenders)),
            "verdict": verdict(contenders, cores_available()),
        }
        for name, contenders in found.items()
    }
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **machine(),
        "file": str(asked.file),
        "workers": asked.threads,
        "device": asked.device,
        "image_size": asked.image_size,
        "window": asdict(window),
        "loaders": loaders,
        "left_out": left_out,
    }


def _figures(contender: Contender) -> dict[str, Any]:
    assert contender.cold is not None
    return {
        "images_per_second": [sample.images for sample in contender.samples],
        "cores_busy": [sample.cores for sample in contender.samples],
        "cores_idle": [sample.idle for sample in contender.samples],
        "cpu_seconds_per_image": contender.cpu,
        "memory_bytes": contender.cold.memory,
        "warmup_seconds": contender.cold.warmup,
    }
