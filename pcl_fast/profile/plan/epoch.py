"""A run on several GPUs, put together: what a step waits for, what binds, how long it all takes."""

import math
from dataclasses import dataclass
from typing import Literal

from pcl_fast.config import Config
from pcl_fast.errors import ConfigError
from pcl_fast.profile.plan.allreduce import LINK_REACHED, Cluster, exchange_of
from pcl_fast.profile.plan.basis import Basis
from pcl_fast.profile.plan.feed import Feed
from pcl_fast.profile.plan.measured import StepTime
from pcl_fast.profile.roofline import Kernel, StepFloor, StepWork
from pcl_fast.profile.traffic import forward

Part = Literal["computing", "the all-reduce", "data"]
ALLREDUCE_WANTED = 0.1  # of computing: what the network has to allow


@dataclass(frozen=True, slots=True, kw_only=True)
class Images:
    """Images for training and for evaluation; bytes of one of them as stored, None if nothing is read."""

    train: int
    val: int
    stored: float | None
    stored_basis: Basis | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A resolved configuration with as many ranks as the cluster has GPUs, and its parts.

    Seconds are of a step of all ranks unless said otherwise. The host prepares batches while GPUs compute;
    the all-reduce follows computing. A core for each GPU is kept for the process that drives it.

    `pace`: of each epoch, the share of computing that its smaller views take; empty where views have one
    size. What is said of a step, and of an epoch, is of views of full size.
    """

    config: Config
    cluster: Cluster
    work: StepWork
    floor: StepFloor
    step: StepTime
    feed: Feed | None
    images: Images
    pace: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """ConfigError for a batch that the data do not fill."""
        if self.steps_per_epoch == 0:
            ranks, batch = self.cluster.ranks, self.config.train.batch_size
            raise ConfigError(
                f"--train.batch-size {batch} on {ranks} GPUs: {ranks * batch:,} images a step are more than "
                f"the {self.images.train:,} there are; give a smaller batch or fewer GPUs"
            )

    @property
    def global_batch(self) -> int:
        """Images a step, of all ranks."""
        return self.config.train.batch_size * self.cluster.ranks

    @property
    def steps_per_epoch(self) -> int:
        """An incomplete last batch counts if it is not left out."""
        images, batch = self.images.train, self.global_batch
        return images // batch if self.config.data.drop_last else -(-images // batch)

    @property
    def allreduce(self) -> float:
        """Seconds of adding gradients and statistics up."""
        return self.cluster.seconds(exchange_of(self.work, self.config))

    @property
    def on_gpus(self) -> float:
        """Seconds of computing and the all-reduce, one after the other."""
        return self.step.seconds + self.allreduce

    @property
    def feeding_cores(self) -> int:
        """Of a node, without those that drive its GPUs, and no more than `--data.workers`; one at least."""
        free, workers = max(1, self.cluster.cores - self.cluster.gpus), self.config.data.workers
        return free if workers is None else min(free, max(1, workers) * self.cluster.gpus)

    @property
    def fed(self) -> float | None:
        """Images a second that the hosts prepare, all nodes together; None if nothing is loaded."""
        return None if self.feed is None else self.cluster.nodes * self.feeding_cores * self.feed.rate

    @property
    def loading(self) -> float:
        """Seconds that the hosts take to prepare a step's images."""
        return 0.0 if self.fed is None else self.global_batch / self.fed

    @property
    def cores_needed(self) -> int:
        """Of a node, so that data do not bind, with those that drive its GPUs."""
        wanted = (
            0.0
            if self.feed is None
            else self.global_batch / self.on_gpus / self.cluster.nodes / self.feed.rate
        )
        return math.ceil(wanted) + self.cluster.gpus

    @property
    def step_seconds(self) -> float:
        """What a step takes: as long as the slower of GPUs and hosts."""
        return max(self.on_gpus, self.loading)

    @property
    def binds(self) -> Part:
        """What takes longest."""
        if self.loading > self.on_gpus:
            return "data"
        return "the all-reduce" if self.allreduce > self.step.seconds else "computing"

    @property
    def images_per_second(self) -> float:
        """All ranks together."""
        return self.global_batch / self.step_seconds

    @property
    def epoch_seconds(self) -> float:
        """Of the training steps of an epoch."""
        return self.steps_per_epoch * self.step_seconds

    @property
    def seconds_of_epochs(self) -> tuple[float, ...]:
        """Of the training steps of each epoch."""
        return tuple(
            self.steps_per_epoch * max(share * self.step.seconds + self.allreduce, self.loading)
            for share in self.pace or (1.0,) * self.config.train.epochs
        )

    @property
    def evaluations(self) -> int:
        """After every so many epochs, and after the last."""
        return -(-self.config.train.epochs // self.config.train.eval_every)

    @property
    def evaluation_seconds(self) -> float:
        """Of one: each rank runs all networks forward on its part, with the share of its floor a step has."""
        share = self.floor.seconds["fused"] / self.step.seconds
        own = -(-self.images.val // self.cluster.ranks)
        computing = own * forward_seconds(self.work, self.floor, self.config.train.eval_batch_size) / share
        return max(computing, 0.0 if self.fed is None else self.images.val / self.fed)

    @property
    def run_seconds(self) -> float:
        """All epochs and evaluations; without start, compilation and checkpoints."""
        return sum(self.seconds_of_epochs) + self.evaluations * self.evaluation_seconds

    @property
    def network_needed(self) -> float:
        """Bytes/s for each GPU, each way, with which moving takes ALLREDUCE_WANTED of computing."""
        ranks, moved = self.cluster.ranks, exchange_of(self.work, self.config).bytes
        return 2 * (ranks - 1) / ranks * moved / (ALLREDUCE_WANTED * self.step.seconds) / LINK_REACHED


def forward_seconds(work: StepWork, floor: StepFloor, batch: int) -> float:
    """The floor of evaluating an image: one view through the trunk, every branch, the ensemble's classifier.

    And through the mean teachers likewise.
    """
    network = work.network
    parts = [(each, 1) for each in network.trunk] + network.of_peers(work.num_peers)
    parts += [(each, 1) for each in work.over_all]
    networks = 1 + (work.teacher != "none")
    seconds = 0.0
    for operation, times in parts:
        for one in forward(operation, "fused", work.width, statistics=False):
            moved = work.width * one.elements * batch + one.weight_bytes
            kernel = Kernel(one.flops * batch, moved, one.launches, networks * times)
            seconds += kernel.seconds(floor.ceilings, floor.ceilings.kernel_seconds)
    return seconds / batch
