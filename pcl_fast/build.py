"""From a configuration to the parts of a run: network, objective, optimizer, state."""

import torch

from pcl_fast import kernels
from pcl_fast.config import Config
from pcl_fast.device import memory_format, prepare_backend
from pcl_fast.guard import FiniteGuard
from pcl_fast.models.peers import PeerNetwork
from pcl_fast.models.zoo import find_backbone
from pcl_fast.objectives import Objective, make_objective
from pcl_fast.step.mean_teacher import MeanTeacher
from pcl_fast.step.state import Forward, TrainState

AMP_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def build_network(config: Config, objective: Objective) -> PeerNetwork:
    """The multi-branch network with weights drawn from `config.seed`, on the CPU, in its memory layout.

    The caller's random state is left as it was.
    """
    backbone = find_backbone(config.model, config.split)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network = PeerNetwork(
            backbone,
            config.data.classes,
            objective.num_peers,
            ensemble=objective.has_ensemble,
            bn_views=config.pcl.bn_views,
            trunk_views=config.pcl.trunk_views,
        )
    if uses_kernels(config):
        network.use_kernels()
    return network.to(memory_format=memory_format(config.channels_last))  # pyright: ignore[reportCallIssue]


def build_state(config: Config) -> TrainState:
    """Everything a step needs, at step 0. `config` must be resolved (`device.resolve`)."""
    device = torch.device(config.device)
    prepare_backend(config)
    objective = make_objective(config)
    network = build_network(config, objective).to(device)
    mean_teacher = MeanTeacher(network, config.pcl.ema_bn) if objective.uses_mean_teacher else None
    optim = config.optim
    optimizer = torch.optim.SGD(
        network.parameters(),
        lr=optim.lr,
        momentum=optim.momentum,
        nesterov=optim.nesterov,
        weight_decay=optim.weight_decay,
        fused=True,
    )
    torch.manual_seed(config.seed)  # of dropout, in networks that have it
    return TrainState(
        network=network,
        mean_teacher=mean_teacher,
        objective=objective,
        optimizer=optimizer,
        guard=FiniteGuard((*objective.term_names, "gradient norm"), device),
        amp_dtype=AMP_DTYPES[config.amp.dtype],
        student_forward=_forward(network, config),
        teacher_forward=_forward(mean_teacher.network, config) if mean_teacher else None,
    )


def describe_kernels(config: Config) -> str:
    """Whose kernels a resolved configuration trains with."""
    if config.compile:
        return "torch.compile's"
    return kernels.describe() if uses_kernels(config) else "torch's"


def uses_kernels(config: Config) -> bool:
    """Whether a resolved configuration wants our kernels: they are the CPU's, and channels-last."""
    fits = config.device == "cpu" and config.channels_last == "on"
    return fits and config.kernels == "auto" and not config.compile


def _forward(network: torch.nn.Module, config: Config) -> Forward:
    return torch.compile(network) if config.compile else network
