"""How far a run is: what a checkpoint holds besides the networks."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pcl_fast.dist import World
from pcl_fast.errors import ConfigError
from pcl_fast.metrics import RunningMeans, Tally, accuracies, compared
from pcl_fast.step.state import TrainState, random_state, restore_random_state

Accuracies = dict[str, dict[str, float]]


@dataclass
class Progress:
    """Steps done, epochs closed, records written, the newest accuracies; and this rank's running means."""

    recent: RunningMeans
    epoch_means: RunningMeans
    steps_done: int = 0
    epochs_closed: int = 0
    records: int = 0
    accuracies: Accuracies = field(default_factory=dict)

    def evaluated(self, tallies: Sequence[Tally]) -> dict[str, Any]:
        """Keep the accuracies that all ranks have counted; what to write down of them."""
        self.accuracies = {head: found.as_dict() for head, found in accuracies(tallies).items()}
        between = compared(tallies)
        return {"val": self.accuracies} | ({"between": between.as_dict()} if between else {})

    def checkpoint(self, state: TrainState, world: World) -> dict[str, Any] | None:
        """All that a later run needs to go on; on the first rank, and None on others: all call it."""
        own = {
            "recent": self.recent.state_dict(),
            "epoch_means": self.epoch_means.state_dict(),
            "rng": random_state(self.recent.sums.device),
        }
        ranks = world.gather(own)
        if not world.is_first:
            return None
        progress = {
            "steps_done": self.steps_done,
            "epochs_closed": self.epochs_closed,
            "records": self.records,
            "accuracies": self.accuracies,
        }
        return {"progress": progress, "state": state.state_dict(), "ranks": ranks}

    def restore(self, saved: dict[str, Any], state: TrainState, world: World) -> None:
        """Go on from a checkpoint, on as many ranks as wrote it to the bit, or on others.

        ConfigError if it is of another version.
        """
        if "ranks" not in saved:
            raise ConfigError(
                "the checkpoint is of another version of pcl_fast, which cannot go on here; "
                "give another --run-dir, or --no-resume to begin anew"
            )
        state.load_state_dict(saved["state"])
        progress = saved["progress"]
        self.steps_done, self.epochs_closed = progress["steps_done"], progress["epochs_closed"]
        self.records, self.accuracies = progress["records"], progress["accuracies"]
        ranks = saved["ranks"]
        self.recent.load_all([rank["recent"] for rank in ranks])
        self.epoch_means.load_all([rank["epoch_means"] for rank in ranks])
        if world.rank < len(ranks):
            restore_random_state(ranks[world.rank]["rng"], self.recent.sums.device)
