"""From a configuration to the parts of a run: network, objective, optimizer, state."""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.func import functional_call

from pcl_fast import kernels
from pcl_fast.config import Config
from pcl_fast.contract import PeerOutputs
from pcl_fast.device import memory_format, prepare_backend
from pcl_fast.dist import ALONE, World
from pcl_fast.errors import ConfigError
from pcl_fast.first_weights import begin_with
from pcl_fast.guard import FiniteGuard, SpikeGuard
from pcl_fast.kernels.sgd_ema import SgdRule
from pcl_fast.models.network_operations import NetworkOperations, network_operations
from pcl_fast.models.peers import PeerNetwork
from pcl_fast.models.split import NO_TRUNK
from pcl_fast.models.view_norm import synchronise
from pcl_fast.models.zoo import Backbone, find_backbone
from pcl_fast.objectives import Objective, make_objective
from pcl_fast.philox import Stream, philox_torch
from pcl_fast.run_network import RunNetwork
from pcl_fast.step.arena import Arena
from pcl_fast.step.compiled import Compiled, Say
from pcl_fast.step.loss_scale import LossScale
from pcl_fast.step.mean_teacher import MeanTeacher
from pcl_fast.step.reduction import Reduction
from pcl_fast.step.regularise import make_regularisation
from pcl_fast.step.state import Forward, TrainState
from pcl_fast.streams import Fork
from pcl_fast.trained_teacher import load_teacher, teacher_backbone

AMP_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def build_network(config: Config, objective: Objective) -> PeerNetwork:
    """The multi-branch network with weights drawn from `config.seed`, on the CPU, in its memory layout.

    The caller's random state is left as it was.
    """
    backbones = backbones_of(config, objective)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network = PeerNetwork(
            backbones,
            config.data.classes,
            objective.num_peers,
            ensemble=objective.make_head or objective.has_ensemble,
            bn_views=config.pcl.bn_views,
            trunk_views=config.pcl.trunk_views,
        )
    network.split_gradient = objective.split_gradient
    if uses_kernels(config):
        network.use_kernels(torch.device(config.device))
    return network.to(memory_format=memory_format(config.channels_last))  # pyright: ignore[reportCallIssue]


def backbones_of(config: Config, objective: Objective) -> Backbone | tuple[Backbone, ...]:
    """The backbone, cut where the configuration says, or nowhere for a method whose peers share nothing.

    One for all peers, or as many. ConfigError for another number of them, and for a product that is no plain
    network, as its peer has the trunk of another backbone.
    """
    split = config.split if objective.shares_trunk else NO_TRUNK
    names = [name.strip() for name in config.model.split(",")]
    if len(set(names)) == 1 and len(names) in (1, objective.num_peers):
        return find_backbone(names[0], split)
    if len(names) != objective.num_peers:
        peers = f"{objective.num_peers} peers" if objective.num_peers > 1 else "one network"
        raise ConfigError(
            f"--model {config.model}: {len(names)} backbones for the {peers} of --method {config.method}; "
            "give one for all, or one for each"
        )
    product = objective.deployment.peer
    if split != NO_TRUNK and names[product] != names[0]:
        raise ConfigError(
            f"--model {config.model}: --method {config.method} deploys peer {product + 1}, which must be the "
            "plain network, on its own trunk: give the first and it one backbone, or --split none"
        )
    return tuple(find_backbone(name, split) for name in names)


def count_operations(config: Config, objective: Objective) -> NetworkOperations:
    """What a configuration's network, its head and its trained teacher have to do, an image at a time."""
    found = network_operations(
        backbones_of(config, objective),
        config.data.classes,
        config.data.pixels,
        objective.num_peers,
        objective.make_head,
        teacher_backbone(config) if objective.uses_trained_teacher else None,
    )
    return found.deploying(objective.deployment.peer)


def build_state(
    config: Config,
    dtype: torch.dtype = torch.float32,
    say: Say = warnings.warn,
    world: World = ALONE,
    teach: bool = True,
    first: RunNetwork | None = None,
) -> TrainState:
    """Everything a step needs, at step 0, with weights of type `dtype`. `config` must be resolved.

    `say` is told if the network cannot be compiled. Weights are the same on every rank of `world`, random but
    for those of `first`. A trained teacher need not be there unless it is to `teach`.
    """
    device = torch.device(config.device)
    prepare_backend(config)
    objective = make_objective(config)
    objective.move_memory(device)
    network = _first_network(config, objective, first, say).to(device, dtype).train()
    trained = load_teacher(config) if objective.uses_trained_teacher and teach else None
    mean_teacher = MeanTeacher(network, config.pcl.ema_bn) if objective.uses_mean_teacher else None
    teacher = mean_teacher.network if mean_teacher else None
    arena = _build_arena(config, network, teacher, objective.head_weight_decay)
    networks = [part for part in (network, teacher) if part is not None]
    for part in networks:
        part.count_together()
        part.fork = _fork(config, objective.num_peers)
        if config.sync_bn and world.is_joined:
            synchronise(part, world.sum_)
    torch.manual_seed(_seed_of_dropout(config.seed, world.rank))
    watched, spikes = (*objective.term_names, "gradient norm"), config.train.skip_spikes
    return TrainState(
        network=network,
        mean_teacher=mean_teacher,
        objective=objective,
        arena=arena,
        guard=FiniteGuard(_by_rank(watched, world), device),
        amp_dtype=AMP_DTYPES[config.amp.dtype],
        student_forward=_forward(network, arena.student_half, config.compile, say),
        teacher_forward=_teacher_forward(config, teacher, trained, arena, say),
        fork=_fork(config, 2),
        reduction=_reduction(config, world, arena, networks, len(watched)),
        spikes=SpikeGuard(spikes, config.train.skip_at_most, device) if spikes else None,
        loss_scale=LossScale(device) if config.amp.dtype == "float16" else None,
        regularise=make_regularisation(config),
    )


def _first_network(config: Config, objective: Objective, first: RunNetwork | None, say: Say) -> PeerNetwork:
    """The network as it begins; `say` is told what it takes of `first`."""
    network = build_network(config, objective)
    if first is not None:
        say(begin_with(network, objective, first))
    return network


def _seed_of_dropout(seed: int, rank: int) -> int:
    """Another for each rank, in its low 32 bits: a CPU's generator looks at no others."""
    return int(philox_torch((seed, Stream.DROPOUT), rank, 0, 0, 0)[0]) if rank else seed


def _teacher_forward(
    config: Config, mean: PeerNetwork | None, trained: PeerNetwork | None, arena: Arena, say: Say
) -> Forward | None:
    if mean is not None:
        return _forward(mean, arena.teacher_half, config.compile, say)
    if trained is None:
        return None
    like = arena.buffers.values
    layout = memory_format(config.channels_last)
    moved = trained.to(like.device, like.dtype).to(memory_format=layout)  # pyright: ignore[reportCallIssue]
    return _forward(moved, {}, config.compile, say)


def _by_rank(names: tuple[str, ...], world: World) -> tuple[str, ...]:
    """What the guard watches: on several ranks, each number of each, then the norm of all gradients."""
    if not world.is_joined:
        return names
    each = [f"{name} on rank {rank}" for rank in range(world.size) for name in names]
    return (*each, "norm of all gradients")


def _reduction(
    config: Config, world: World, arena: Arena, networks: Sequence[PeerNetwork], num_watched: int
) -> Reduction | None:
    if not world.is_joined:
        return None
    gradients = arena.buffers.gradients
    half = config.dist.reduce_dtype == "bfloat16"
    return Reduction(world, gradients, networks, num_watched, torch.bfloat16 if half else gradients.dtype)


def _build_arena(
    config: Config, network: PeerNetwork, teacher: PeerNetwork | None, head_decay: float | None
) -> Arena:
    """On a GPU, with copies of the weights in bfloat16 if that is used; a CPU's kernels make their own."""
    optim = config.optim
    rule = SgdRule(momentum=optim.momentum, weight_decay=optim.weight_decay, nesterov=optim.nesterov)
    halves = torch.device(config.device).type == "cuda" and config.amp.dtype == "bfloat16"
    decays = {} if head_decay is None else {"ensemble": head_decay}
    return Arena(network, teacher, rule, torch.bfloat16 if halves else None, decays)


def _fork(config: Config, tasks: int) -> Fork:
    """Streams for so many tasks at once; a compiled network keeps to one."""
    return Fork(torch.device(config.device), 0 if config.compile else tasks - 1)


def describe_kernels(config: Config) -> str:
    """Whose kernels a resolved configuration trains with."""
    if config.compile:
        return "torch.compile's"
    return kernels.describe(torch.device(config.device)) if uses_kernels(config) else "torch's"


def uses_kernels(config: Config) -> bool:
    """Whether a resolved configuration wants our kernels in the network: they are channels-last."""
    return config.channels_last == "on" and config.kernels == "auto" and not config.compile


def _forward(network: PeerNetwork, half: dict[str, Tensor], compiled: bool, say: Say) -> Forward:
    """How a step runs a network: with the weights in `half` in the place of its own of these names."""

    def run(views_VBCHW: Tensor) -> PeerOutputs:
        return functional_call(network, half, (views_VBCHW,)) if half else network(views_VBCHW)

    return Compiled(run, say) if compiled else run
