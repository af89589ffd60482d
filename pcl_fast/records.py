"""What a run writes down of some steps: a line of metrics.jsonl."""

from pcl_fast.metrics import RunningMeans
from pcl_fast.objectives import Objective
from pcl_fast.sinks import Record
from pcl_fast.step.state import TrainState
from pcl_fast.step.train_step import Moment


def train_heads(objective: Objective) -> list[str]:
    """The heads whose right answers a step counts."""
    return [f"peer{j + 1}" for j in range(objective.num_peers)] + ["ensemble"] * objective.has_ensemble


def num_measured(objective: Objective) -> int:
    """How many numbers a step measures: terms, the gradient's norm, right answers."""
    return len(objective.term_names) + 1 + len(train_heads(objective))


def describe(running: RunningMeans, moment: Moment, state: TrainState, epoch: int) -> Record:
    """The means of some steps on all ranks, and the schedules of the last of them; waits for the device."""
    names, heads = state.objective.term_names, train_heads(state.objective)
    means = running.means()
    correct = means[len(names) + 1 :]
    record: Record = {
        "epoch": epoch,
        "step": moment.step,
        "lr": moment.lr,
        "distill_weight": moment.distill_weight,
        "ema_coefficient": moment.ema_coefficient,
        "loss": sum(means[: len(names)]),
        "terms": dict(zip(names, means, strict=False)),
        "gradient_norm": means[len(names)],
        "train_top1": {head: 100 * share for head, share in zip(heads, correct, strict=True)},
        "images_per_second": running.rate(),
    }
    skipping = [part for part in (state.spikes, state.loss_scale) if part is not None]
    if skipping:
        record["skipped"] = sum(int(part.skipped) for part in skipping)
    return record
