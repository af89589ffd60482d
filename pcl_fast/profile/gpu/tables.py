"""The tables of a GPU's measurements, in markdown: the device, kernels, steps, choices."""

import statistics
from collections.abc import Iterable, Sequence

from pcl_fast.profile.gpu.found import Found
from pcl_fast.profile.gpu.runner import Row

MICRO, MILLI = 1e6, 1e3
UNCOMPILED = ("captured", "eager")
COMPILED = ("captured-compiled", "compiled")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A markdown table; empty without rows."""
    lines = [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows]
    if not lines:
        return ""
    return "\n".join([f"| {' | '.join(head)} |", "|" + "---|" * len(head), *lines])


def spread(seconds: Sequence[float], unit: float) -> str:
    """The median, and in brackets the least and the most."""
    low, middle, high = (figure(unit * each) for each in _three(seconds))
    return f"{middle} ({low} - {high})"


def figure(value: float) -> str:
    """Three digits that count."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 1 else f"{value:.3g}"


def percent(share: float) -> str:
    """A share of 1 in percent."""
    return f"{100 * share:.1f} %" if share < 0.1 else f"{100 * share:.0f} %"


def device_table(found: Found) -> str:
    """Least times of kernels and launches, bandwidth, products."""
    lines = [
        [f"kernel in a graph of {row['kernels']:,}: {row['name']}", f"{spread(row['seconds'], MICRO)} us"]
        for row in (*found.rows("kernel"), *found.rows("streams"))
    ]
    lines += [
        [f"launch: {row['name']}", f"{spread(row['seconds'], MICRO)} us"] for row in found.rows("launch")
    ]
    for row in found.rows("copy"):
        rates = [2 * row["gib"] * 2**30 / each / 1e12 for each in row["seconds"]]
        lines.append([f"copy of {row['gib']:g} GiB, read and written", f"{spread(rates, 1)} TB/s"])
    for row in found.rows("product"):
        rates = [2 * row["size"] ** 3 / each / 1e12 for each in row["seconds"]]
        lines.append([f"product of random bfloat16 matrices, {row['size']}", f"{spread(rates, 1)} TFLOP/s"])
    return table(["what", "median (least - most)"], lines)


def step_table(found: Found) -> str:
    """A row for each network and batch: PCL in every mode, alone, and what that is of the floor."""
    head = ["network", "batch", "captured, ms", "images/s", "eager, ms", "captured + compiled, ms"]
    head += ["compiled, ms", "of the fused-byte floor", "MFU", "peak GiB", "alone, ms", "PCL / 3 alone"]
    networks = dict.fromkeys((row["model"], row["batch"]) for row in found.rows("step", method="pcl"))
    return table(head, [_step_line(found, *network) for network in networks])


def _step_line(found: Found, model: str, batch: int) -> list[str]:
    wanted: Row = {"model": model, "batch": batch, "augmented": False}
    rows = {mode: found.row("step", mode=mode, method="pcl", **wanted) for mode in (*UNCOMPILED, *COMPILED)}
    cells = {mode: spread(row["seconds"], MILLI) if row else "-" for mode, row in rows.items()}
    alone = found.median("step", mode="captured", method="vanilla", **wanted)
    floor = found.row("floor", model=model, batch=batch, method="pcl")
    captured = rows["captured"]
    line = [model, str(batch), cells["captured"], "-", *(cells[mode] for mode in ("eager", *COMPILED))]
    line += ["-", "-", "-", f"{MILLI * alone:.2f}" if alone else "-", "-"]
    if captured is not None:
        seconds = statistics.median(captured["seconds"])
        line[3] = f"{batch / seconds:,.0f}"
        line[9] = figure(captured.get("peak_bytes", 0) / 2**30)
        if floor is not None:
            line[7] = percent(floor["floor_seconds"]["fused"] / seconds)
            line[8] = percent(floor["flops"] / seconds / floor["ceilings"]["flops"])
        if alone:
            line[11] = f"{seconds / (3 * alone):.2f}"
    return line


def count_table(found: Found) -> str:
    """Kernels and launches of a PCL step."""
    lines = [
        [
            row["model"],
            str(row["batch"]),
            row["mode"],
            str(row["kernels"]),
            str(row["copies"]),
            str(row["launches"]),
        ]
        for row in found.rows("count")
    ]
    return table(["network", "batch", "mode", "kernels", "copies and fills", "calls of the host"], lines)


def update_table(found: Found) -> str:
    """The update of weights against its bytes."""
    return table(
        ["weights", "by", "us", "TB/s", "of a copy's bandwidth"],
        [
            [
                f"{row['weights'] / 1e6:g} M",
                row["by"],
                spread(row["seconds"], MICRO),
                *_rate(found, row, "seconds"),
            ]
            for row in found.rows("update")
        ],
    )


def loss_table(found: Found) -> str:
    """Losses and gradients: microseconds of each way."""
    cases = dict.fromkeys((row["batch"], row["classes"]) for row in found.rows("loss"))
    ways = ("ours", "torch", "autograd")
    lines: list[list[str]] = []
    for batch, classes in cases:
        rows = [found.row("loss", by=by, batch=batch, classes=classes) for by in ways]
        times = [spread(row["seconds"], MICRO) if row else "-" for row in rows]
        lines.append([str(batch), str(classes), *times])
    return table(["batch", "classes", "ours, us", "its formula in torch, us", "autograd, us"], lines)


def norm_table(found: Found) -> str:
    """BatchNorm, residual and ReLU, forward and in both ways."""
    return table(
        ["layer", "by", "forward, us", "forward and backward, us", "TB/s", "of a copy's bandwidth"],
        [
            [
                row["case"],
                row["by"],
                spread(row["forward_seconds"], MICRO),
                spread(row["seconds"], MICRO),
                *(_rate(found, row, "seconds") if row["by"] == "ours" else ("-", "-")),
            ]
            for row in sorted(found.rows("norm"), key=lambda row: row["case"])
        ],
    )


def view_table(found: Found) -> str:
    """Views made on the device."""
    lines = [
        [
            row["name"],
            str(row["batch"]),
            str(row["views"]),
            spread(row["seconds"], MICRO),
            *_view_rates(found, row),
        ]
        for row in found.rows("views")
    ]
    return table(["what", "images", "views of each", "us", "images/s", "of a copy's bandwidth"], lines)


def choice_table(found: Found, what: str) -> str:
    """Steps with something done otherwise, or of several runs, and how they compare with the first."""
    lines: list[list[str]] = []
    for row in found.rows(what):
        first = found.median(what, model=row["model"], batch=row["batch"])
        assert first is not None
        ratio = statistics.median(row["seconds"]) / first
        lines.append(
            [row["model"], str(row["batch"]), row["name"], spread(row["seconds"], MILLI), f"{ratio:.2f}"]
        )
    return table(["network", "batch", "step", "ms", "times as long as the first"], lines)


def share_table(found: Found) -> str:
    """The update within a step."""
    lines: list[list[str]] = []
    for row in found.rows("update share"):
        update, step = statistics.median(row["seconds"]), statistics.median(row["step_seconds"])
        moved = {**row, "bytes": 32 * row["weights"]}
        cells = [
            row["model"],
            str(row["batch"]),
            f"{row['weights'] / 1e6:.2f} M",
            spread(row["seconds"], MICRO),
        ]
        lines.append([*cells, percent(update / step), *_rate(found, moved, "seconds")])
    return table(["network", "batch", "weights", "us", "of the step", "TB/s", "of a copy's bandwidth"], lines)


def _rate(found: Found, row: Row, key: str) -> tuple[str, str]:
    """TB/s, and the share of what a copy reaches."""
    rate = row["bytes"] / statistics.median(row[key])
    return f"{rate / 1e12:.2f}", percent(rate / found.ceilings.bandwidth)


def _view_rates(found: Found, row: Row) -> tuple[str, str]:
    images = row["batch"] / statistics.median(row["seconds"])
    return f"{images:,.0f}", _rate(found, row, "seconds")[1] if row.get("bytes") else "-"


def _three(values: Sequence[float]) -> tuple[float, float, float]:
    return min(values), statistics.median(values), max(values)
