"""What a method learns after every epoch from images that are held out of training."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pcl_fast.contract import EvalLoader, ended
from pcl_fast.evaluate import predictor
from pcl_fast.first_batch import CheckedEvalLoader
from pcl_fast.objectives import Objective
from pcl_fast.sinks import Record
from pcl_fast.step.state import TrainState


@dataclass(frozen=True, slots=True)
class Observed:
    """What a method adds up over one rank's held-out images, on the CPU; no sums without images."""

    images: int
    sums: Tensor | None


@torch.no_grad()
def observe(
    state: TrainState, loader: EvalLoader | None, each_batch: Callable[[], None] = lambda: None
) -> Observed:
    """Show the method a rank's part of the held-out images, as `tally_state` shows it others.

    The student is left in eval mode. `each_batch` is called before every batch and may raise to stop.

    Raises:
        DataError: if the first batch is not as agreed.
    """
    assert loader is not None, "a method that wants images held out is given some (--data.hold-out)"
    device = next(state.network.parameters()).device
    predict = predictor(state.network, state.amp_dtype)
    images, sums = 0, None
    with ended(iter(CheckedEvalLoader(loader, state.network.num_classes, device))) as batches:
        for batch in batches:
            each_batch()
            found = state.objective.observe(predict(batch.images_BCHW[None]), batch.labels_B)
            images, sums = images + len(batch.labels_B), found if sums is None else sums + found
    return Observed(images, None if sums is None else sums.cpu())


def learn(objective: Objective, by_rank: Sequence[Observed]) -> Record:
    """Have the method conclude from what all ranks have observed; what it remembers from then on."""
    sums = [each.sums for each in by_rank if each.sums is not None]
    objective.conclude(torch.stack(sums).sum(0), sum(each.images for each in by_rank))
    return {name: tensor.tolist() for name, tensor in objective.memory.items()}
