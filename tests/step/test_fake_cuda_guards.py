"""BatchNorm over all ranks and the guard against spikes in a step on a CUDA device that is only pretended."""

import pytest
import torch
from torch import Tensor

from pcl_fast.guard import SpikeGuard
from pcl_fast.models.view_norm import synchronise
from pcl_fast.step.obstacles import find_obstacle
from tests.step.test_fake_cuda import CUDA, fake_cuda, make_step, strays_of

__all__ = ["fake_cuda"]  # a fixture


@pytest.mark.usefixtures("fake_cuda")
@pytest.mark.parametrize("trunk_views", ["batched", "loop"])
def test_both_stay_on_the_device_and_ask_it_nothing(trunk_views: str) -> None:
    step = make_step(trunk_views=trunk_views)
    assert step.state.mean_teacher is not None
    places: list[torch.device] = []

    def double(tensor: Tensor) -> None:
        """Two ranks with the same images."""
        places.append(tensor.device)
        tensor.mul_(2)

    for network in (step.state.network, step.state.mean_teacher.network):
        synchronise(network, double)
    step.state.spikes = SpikeGuard(4.0, 3, CUDA)
    strays: list[str] = []
    assert find_obstacle(lambda: strays.extend(strays_of(step))) is None
    assert strays == []
    assert len(places) >= 4 * 9, "two sums for each norm of two networks"
    assert set(places) == {CUDA}
