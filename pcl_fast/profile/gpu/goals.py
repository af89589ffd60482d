"""What the fast step was meant to reach, beside what was measured."""

from collections.abc import Callable

from pcl_fast.config import TRAIN_IMAGES
from pcl_fast.profile.gpu.found import Found
from pcl_fast.profile.gpu.runner import Row
from pcl_fast.profile.gpu.tables import figure, percent, table

MODEL, BATCH, EPOCHS = "resnet32", 128, 300
STEPS = EPOCHS * (TRAIN_IMAGES["cifar100"] // BATCH)
OURS: Row = {"model": MODEL, "batch": BATCH, "method": "pcl", "augmented": False}

Measured = Callable[[Found], str | None]


def goal_table(found: Found) -> str:
    """A row a goal; what was not measured says so."""
    return table(
        ["what", "good", "wanted", "moonshot", "measured"],
        [[*goal, measure(found) or "not measured"] for goal, measure in _GOALS],
    )


def _row_time(found: Found) -> str | None:
    seconds = found.median("step", mode="captured", model=MODEL, batch=BATCH, augmented=True)
    return None if seconds is None else f"{_minutes(seconds)}, projected from the step; without evaluation"


def _seeds_time(found: Found) -> str | None:
    seconds = found.median("seeds", model=MODEL, runs=3)
    return None if seconds is None else f"{_minutes(seconds)}, projected from a step on noise"


def _over_baseline(found: Found) -> str | None:
    ours = _least_step(found)
    plain, amp = (found.median("step", mode=mode, **OURS) for mode in ("baseline", "baseline-amp"))
    if ours is None or plain is None:
        return None
    beside = f"; {amp / ours:.1f}x over the same in bfloat16, channels-last" if amp else ""
    return f"{plain / ours:.1f}x, computing alone{beside}"


def _over_single(found: Found) -> str | None:
    shares: list[str] = []
    for row in found.rows("step", mode="captured", method="vanilla", augmented=False):
        pcl = found.median("step", mode="captured", method="pcl", augmented=False, **_network(row))
        alone = found.median("step", mode="captured", method="vanilla", **_network(row))
        if pcl and alone:
            shares.append(f"{row['model']} @{row['batch']} {pcl / (3 * alone):.2f}")
    return ", ".join(shares) or None


def _idle(found: Found) -> str | None:
    fed = found.median("step", mode="captured", model=MODEL, batch=BATCH, augmented=True)
    noise = found.median("step", mode="captured", **OURS)
    if fed is None or noise is None:
        return None
    share = percent(max(0.0, 1 - noise / fed))
    return f"CIFAR: 0, views are made in the graph, which takes {share} of a step; ImageNet not measured"


def _share_of_floor(found: Found) -> str | None:
    shares: list[str] = []
    for floor in found.rows("floor", method="pcl"):
        seconds = found.median("step", mode="captured", method="pcl", augmented=False, **_network(floor))
        if seconds and floor["model"] in ("resnet18", "resnet50"):
            share = floor["floor_seconds"]["fused"] / seconds
            shares.append(f"{floor['model']} @{floor['batch']} {percent(share)}")
    return ", ".join(shares) or None


def _update(found: Found) -> str | None:
    shares: list[str] = []
    for row in found.rows("update share"):
        part = found.median("update share", **_network(row))
        step = found.median("update share", "step_seconds", **_network(row))
        if part and step:
            shares.append(f"{row['model']} @{row['batch']} {percent(part / step)} of a step")
    for row in found.rows("update", by="ours"):
        seconds = found.median("update", by="ours", weights=row["weights"])
        if seconds:
            bandwidth = row["bytes"] / seconds / found.ceilings.bandwidth
            shares.append(f"{row['weights'] / 1e6:g} M weights {percent(bandwidth)} of copy bandwidth")
    return "one kernel: " + ", ".join(shares) if shares else None


def _loss(found: Found) -> str | None:
    seconds = found.median("loss", by="ours", batch=BATCH, classes=100)
    return None if seconds is None else f"2 kernels, {figure(1e6 * seconds)} us together (100 classes)"


def _host_calls(found: Found) -> str | None:
    row = found.row("count", mode="captured", model=MODEL, batch=BATCH)
    return None if row is None else f"{row['launches']}, of which {row['graphs']} replay"


def _least_step(found: Found) -> float | None:
    modes = (found.median("step", mode=mode, **OURS) for mode in ("captured", "captured-compiled"))
    return min((seconds for seconds in modes if seconds is not None), default=None)


def _network(row: Row) -> Row:
    return {"model": row["model"], "batch": row["batch"]}


def _minutes(step: float) -> str:
    return f"{step * STEPS / 60:.1f} min"


_GOALS: tuple[tuple[tuple[str, str, str, str], Measured], ...] = (
    ((f"ResNet-32, CIFAR-100, {EPOCHS} epochs", "8 min", "5 min", "2.5 - 4 min"), _row_time),
    (("the same, 3 seeds together", "20 min", "12 min", "8 min"), _seeds_time),
    (("over the straightforward eager implementation, ResNet-32", "3x", "5x", "8x"), _over_baseline),
    (("PCL(3) step over 3 single-network steps", "1.5", "1.36", "1.0 - 1.1"), _over_single),
    (("GPU idle for data", "5 %", "2 %", "0 on CIFAR"), _idle),
    (("of the fused-byte floor, ImageNet", "50 %", "60 %", "73 %"), _share_of_floor),
    (("optimizer and averages", "3 % of a step", "one kernel, 75 % of copy bandwidth", "hidden"), _update),
    (("losses, forward and backward", "10 kernels", "2", "1"), _loss),
    (("host calls a step", "1 replay + 1 copy", "1 replay", "1 an epoch"), _host_calls),
)
