"""The accuracy of every network a run has trained: each peer, each mean teacher, and both ensembles."""

from collections.abc import Callable

import torch
from torch import Tensor

from pcl_fast.contract import EvalLoader, PeerOutputs
from pcl_fast.first_batch import CheckedEvalLoader
from pcl_fast.metrics import Accuracy, Predict, Tally, accuracies, tally_heads
from pcl_fast.models.peers import PeerNetwork
from pcl_fast.step.state import TrainState


def evaluate_state(
    state: TrainState, loader: EvalLoader, each_batch: Callable[[], None] = lambda: None
) -> dict[str, Accuracy]:
    """Accuracy over `loader` of every head, as `tally_state` counts it; on one rank."""
    return accuracies([tally_state(state, loader, each_batch)])


def tally_state(
    state: TrainState, loader: EvalLoader, each_batch: Callable[[], None] = lambda: None
) -> Tally:
    """What every head gets right of a rank's part of `loader`, in eval mode, in which the networks are left.

    The heads are the student's (`peer1`..., `ensemble`) and the mean teacher's (`mean_teacher1`...,
    `mean_ensemble`). `each_batch` is called before every batch and may raise to stop.

    Raises:
        DataError: if the first batch is not as agreed.
    """
    device = next(state.network.parameters()).device
    networks = {("peer", "ensemble"): predictor(state.network, state.amp_dtype)}
    if state.mean_teacher is not None:
        teacher = predictor(state.mean_teacher.network, state.amp_dtype)
        networks["mean_teacher", "mean_ensemble"] = teacher
    return tally_heads(networks, CheckedEvalLoader(loader, state.network.num_classes, device), each_batch)


def predictor(network: PeerNetwork, amp_dtype: torch.dtype) -> Predict:
    """How a network is asked in evaluation: in eval mode, in which it is put, and in training's precision."""
    network.eval()

    def predict(views_VBCHW: Tensor) -> PeerOutputs:
        with torch.autocast(views_VBCHW.device.type, amp_dtype, enabled=amp_dtype.itemsize < 4):
            return network(views_VBCHW)

    return predict
