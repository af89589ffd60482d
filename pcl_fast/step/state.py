"""All that training changes, and its saving and restoring."""

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pcl_fast.contract import PeerOutputs
from pcl_fast.errors import ConfigError
from pcl_fast.guard import FiniteGuard, SpikeGuard
from pcl_fast.models.peers import PeerNetwork
from pcl_fast.objectives import Objective
from pcl_fast.step.arena import Arena
from pcl_fast.step.loss_scale import LossScale
from pcl_fast.step.mean_teacher import MeanTeacher
from pcl_fast.step.reduction import Reduction
from pcl_fast.step.regularise import Regularisation
from pcl_fast.streams import Fork

Forward = Callable[[Tensor], PeerOutputs]


@dataclass(slots=True)
class TrainState:
    """The networks and their weights' memory, and how a step runs them.

    `arena` holds parameters, momentum and averages. `student_forward` and `teacher_forward` run the two
    networks (compiled or not), `fork` the one beside the other; `amp_dtype` is the precision of their
    convolutions, and `loss_scale` there if that is float16. `reduction` adds up over all ranks, if there are
    several; `spikes` says which updates to skip; `regularise` changes batches before anything sees them, if
    that is wanted.
    """

    network: PeerNetwork
    mean_teacher: MeanTeacher | None
    objective: Objective
    arena: Arena
    guard: FiniteGuard
    amp_dtype: torch.dtype
    student_forward: Forward
    teacher_forward: Forward | None
    fork: Fork
    reduction: Reduction | None = None
    spikes: SpikeGuard | None = None
    loss_scale: LossScale | None = None
    regularise: Regularisation | None = None

    def learning_mode(self) -> None:
        """Both networks as training runs them, after an evaluation has changed it."""
        self.network.train()
        if self.mean_teacher is not None:
            self.mean_teacher.learning_mode()

    def state_dict(self) -> dict[str, Any]:
        """Everything a later process needs to go on as if nothing had happened: tensors of its own."""
        return {
            "network": _copies(self.network.state_dict()),
            "mean_teacher": _copies(self.mean_teacher.network.state_dict()) if self.mean_teacher else None,
            "momentum": _copies(self.arena.momentum),
            "spikes": self.spikes.state_dict() if self.spikes else None,
            "loss_scale": self.loss_scale.state_dict() if self.loss_scale else None,
            "memory": _copies(self.objective.memory),
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on from `state_dict`. ConfigError if it is of a version that kept other things."""
        if "momentum" not in saved:
            raise ConfigError(
                "the checkpoint is of another version of pcl_fast, which cannot go on here; "
                "give another --run-dir, or --no-resume to begin anew"
            )
        self.network.load_state_dict(saved["network"])
        if self.mean_teacher is not None:
            self.mean_teacher.network.load_state_dict(saved["mean_teacher"])
        self.arena.load_momentum(saved["momentum"])
        self.arena.refresh_half()
        if self.spikes is not None and saved.get("spikes") is not None:
            self.spikes.load_state_dict(saved["spikes"])
        if self.loss_scale is not None and saved.get("loss_scale") is not None:
            self.loss_scale.load_state_dict(saved["loss_scale"])
        for name, tensor in self.objective.memory.items():
            tensor.copy_(saved["memory"][name])

    def checksum(self) -> int:
        """A CRC-32 of all weights, statistics and memory, which are the same on every rank."""
        crc = zlib.crc32(b"")
        remembered = self.objective.memory.values()
        for value in (*self.network.state_dict().values(), self.arena.buffers.momentum, *remembered):
            crc = zlib.crc32(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data, crc)
        return crc

    def deployed_tensors(self) -> dict[str, Tensor]:
        """The product of the method, under the names of the plain backbone (PCL: the first peer's EMA)."""
        deployment = self.objective.deployment
        network = self.network
        if deployment.network == "mean_teacher":
            assert self.mean_teacher is not None, "a method that deploys a mean teacher has one"
            network = self.mean_teacher.network
        return _copies(network.deployed_state_dict(deployment.peer))


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each in memory of its own, and not a view of what all lie in."""
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def random_state(device: torch.device) -> dict[str, Tensor]:
    """Torch's generators: the product draws nothing from them, but a network with dropout does."""
    states = {"cpu": torch.get_rng_state()}
    return states if device.type == "cpu" else states | {"cuda": torch.cuda.get_rng_state(device)}


def restore_random_state(saved: Mapping[str, Tensor], device: torch.device) -> None:
    """Go on drawing from where `random_state` was."""
    torch.set_rng_state(saved["cpu"])
    if device.type == "cuda" and "cuda" in saved:
        torch.cuda.set_rng_state(saved["cuda"], device)
