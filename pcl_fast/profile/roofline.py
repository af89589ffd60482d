"""The floor of a training step: what its arithmetic, its memory traffic and its kernels take at least.

Computed from the network itself (`models/network_operations.py`) for the peers' forward and backward on their
views, the teachers' forward, the losses and the update, by the rules of `traffic.py`. A kernel takes
max(FLOPs / peak, bytes / bandwidth, least time of a kernel); the floor is the sum. Caches are not in it: what
stays in one between two kernels (megabytes of a CIFAR network on a GPU, a chain of residual blocks on the
CPU) is moved faster than memory moves it, and a step that lives on that may pass its floor.
"""

from dataclasses import dataclass
from typing import Literal, get_args

from pcl_fast.build import count_operations
from pcl_fast.config import Config
from pcl_fast.models.network_operations import NetworkOperations
from pcl_fast.models.operations import Operation
from pcl_fast.objectives import make_objective
from pcl_fast.profile.ceilings import Ceilings
from pcl_fast.profile.traffic import FLOAT32, TIERS, Pass, Tier, backward, forward

Trunk = Literal["batched", "loop"]
TRUNKS: tuple[Trunk, ...] = get_args(Trunk)


@dataclass(frozen=True, slots=True)
class Kernel:
    """What a kernel does for all images of a step: FLOPs and bytes; it runs `times`."""

    flops: float
    bytes: float
    launches: int = 1
    times: int = 1

    def seconds(self, ceilings: Ceilings, kernel_seconds: float) -> float:
        """The least that it takes, all `times` together."""
        least = self.launches * kernel_seconds
        return self.times * max(self.flops / ceilings.flops, self.bytes / ceilings.bandwidth, least)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepWork:
    """What a training step has to do.

    `teacher`: the mean teachers' BatchNorm takes statistics of the batch ("train") or has its own ("eval").
    `width`: bytes of an activation, and of the copies of the weights that products read.
    """

    network: NetworkOperations
    batch_size: int
    num_views: int
    num_peers: int
    ensemble: bool
    teacher: Literal["none", "train", "eval"]
    width: int

    @property
    def flops(self) -> int:
        """Of a step: forward, both gradients, the teachers' forward."""
        teacher = self.teacher != "none"
        of_image = self.network.step_flops(self.num_views, self.num_peers, self.ensemble, teacher)
        return self.batch_size * of_image

    @property
    def parameters(self) -> int:
        """Trained ones."""
        return self.network.peer_parameters(self.num_peers, self.ensemble)

    @property
    def over_all(self) -> tuple[Operation, ...]:
        """What looks at all peers: nothing, a linear classifier or another head."""
        return self.network.ensemble(self.num_peers) if self.ensemble else ()

    def bytes(self, tier: Tier) -> float:
        """Read and written in a step."""
        return sum(kernel.times * kernel.bytes for kernel in self.kernels(tier))

    def launches(self, tier: Tier, trunk: Trunk = "batched") -> int:
        """Kernels of a step."""
        return sum(kernel.times * kernel.launches for kernel in self.kernels(tier, trunk))

    def kernels(self, tier: Tier, trunk: Trunk = "batched") -> list[Kernel]:
        """Every kernel of a step; the trunk runs its views as one batch or one after the other."""
        student, teacher = self._students(tier, trunk), self._teachers(tier, trunk)
        return [*student, *teacher, self.loss(), self.update(tier)]

    def loss(self) -> Kernel:
        """All losses and their gradients, in one pass over all logits."""
        trained = self.num_peers + self.ensemble
        rows = 2 * trained + (self.num_peers if self.teacher != "none" else 0)
        return Kernel(0, self.width * rows * self.network.num_classes * self.batch_size)

    def update(self, tier: Tier) -> Kernel:
        """SGD with momentum, the averages and the narrow copies of both: a number once, or as torch does."""
        averaged, copies = self.teacher != "none", self.width < FLOAT32
        if tier == "eager":  # torch._foreach SGD, averages tensor by tensor, casts
            each = 76 + 20 * averaged + 8 * copies
        else:
            each = FLOAT32 * (5 + 2 * averaged) + self.width * copies * (1 + averaged)
        return Kernel(0, each * self.parameters)

    def _students(self, tier: Tier, trunk: Trunk) -> list[Kernel]:
        made: list[Kernel] = []
        for operation, rows, times in self._parts(trunk, ensemble=self.ensemble):
            both = (*forward(operation, tier, self.width), *backward(operation, tier, self.width))
            made += [self._kernel(each, rows, times) for each in both]
        return made

    def _teachers(self, tier: Tier, trunk: Trunk) -> list[Kernel]:
        if self.teacher == "none":
            return [
                self._kernel(each, self.batch_size, 1)
                for operation in self.network.trained_teacher
                for each in forward(operation, tier, self.width, statistics=False)
            ]
        statistics = self.teacher == "train"
        return [
            self._kernel(each, rows, times)
            for operation, rows, times in self._parts(trunk, ensemble=False)
            for each in forward(operation, tier, self.width, statistics)
        ]

    def _parts(self, trunk: Trunk, ensemble: bool) -> list[tuple[Operation, int, int]]:
        """Each operation with the images it is called with, and how often."""
        batch, views = self.batch_size, self.num_views
        rows, times = (batch * views, 1) if trunk == "batched" else (batch, views)
        parts = [(operation, rows, times) for operation in self.network.trunk]
        parts += [(operation, batch, times) for operation, times in self.network.of_peers(self.num_peers)]
        return parts + [(each, batch, 1) for each in self.over_all if ensemble]

    def _kernel(self, one: Pass, rows: int, times: int) -> Kernel:
        moved = self.width * one.elements * rows + one.weight_bytes
        return Kernel(one.flops * rows, moved, one.launches, times)


def step_work(config: Config) -> StepWork:
    """What a step of a resolved configuration has to do; builds one plain network on the CPU."""
    objective = make_objective(config)
    own = config.pcl.ema_bn == "own"
    return StepWork(
        network=count_operations(config, objective),
        batch_size=config.train.batch_size,
        num_views=objective.num_views,
        num_peers=objective.num_peers,
        ensemble=objective.has_ensemble,
        teacher=("train" if own else "eval") if objective.uses_mean_teacher else "none",
        width=FLOAT32 if config.amp.dtype == "float32" else 2,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFloor:
    """The floor of a step under some ceilings.

    `seconds`, by tier, are of arithmetic and traffic alone. Of the tier `fused`, by how the trunk runs its
    views: its `kernels`, and `graph_seconds`, in which none of them is shorter than a kernel can be.
    """

    ceilings: Ceilings
    flops: int
    bytes: dict[Tier, float]
    update_bytes: float
    kernels: dict[Trunk, int]
    seconds: dict[Tier, float]
    graph_seconds: dict[Trunk, float]

    def mfu(self, seconds: float) -> float:
        """Model FLOPs utilisation of a step that takes so long: a share of the peak."""
        return self.flops / seconds / self.ceilings.flops

    def share(self, seconds: float) -> float:
        """The share of the fused-byte floor in a step that takes so long; 1 is as fast as memory allows."""
        return self.seconds["fused"] / seconds


def step_floor(work: StepWork, ceilings: Ceilings) -> StepFloor:
    """Price a step."""

    def seconds(tier: Tier, trunk: Trunk, least: float) -> float:
        return sum(kernel.seconds(ceilings, least) for kernel in work.kernels(tier, trunk))

    return StepFloor(
        ceilings=ceilings,
        flops=work.flops,
        bytes={tier: work.bytes(tier) for tier in TIERS},
        update_bytes=work.update("fused").bytes,
        kernels={trunk: work.launches("fused", trunk) for trunk in TRUNKS},
        seconds={tier: seconds(tier, "batched", 0.0) for tier in TIERS},
        graph_seconds={trunk: seconds("fused", trunk, ceilings.kernel_seconds) for trunk in TRUNKS},
    )
