"""The all-reduce of a step, by the model of a ring.

Of n ranks, each sends and receives 2 (n - 1) / n of the bytes, at the bandwidth of the slowest link, in
2 (n - 1) hops one after the other, of which each waits for a latency. Inside a node the links are NVLink;
with several nodes, each hop is as slow as the network. A share of what links can do is reached. Nothing
overlaps with computing: the step adds gradients up after the whole backward pass.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from pcl_fast.config import Config
from pcl_fast.models.operations import Operation
from pcl_fast.profile.plan.gpus import Gpu
from pcl_fast.profile.roofline import StepWork
from pcl_fast.profile.traffic import FLOAT32

LINK_REACHED = 0.8  # of a link's bandwidth: assumed
HOP_INSIDE, HOP_BETWEEN = 2e-6, 5e-6  # seconds, over NVLink and over a network: assumed
BFLOAT16 = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """`nodes` with `gpus` and `cores` each; `network`: bytes/s for each GPU, each way, between nodes."""

    gpu: Gpu
    gpus: int
    nodes: int
    cores: int
    network: float

    @property
    def ranks(self) -> int:
        """One for each GPU."""
        return self.gpus * self.nodes

    @property
    def bandwidth(self) -> float:
        """Of the slowest link of a ring, as far as it is reached."""
        return LINK_REACHED * (self.gpu.link if self.nodes == 1 else min(self.gpu.link, self.network))

    @property
    def hop(self) -> float:
        """The latency of a hop."""
        return HOP_INSIDE if self.nodes == 1 else HOP_BETWEEN

    def seconds(self, exchange: "Exchange") -> float:
        """Of a step's all-reduces, one after the other."""
        latencies = (exchange.messages - 1) * ring_seconds(0, self.ranks, self.bandwidth, self.hop)
        return latencies + ring_seconds(exchange.bytes, self.ranks, self.bandwidth, self.hop)


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """What a step adds up over all ranks, in bytes, and in how many messages.

    `gradients` of all weights; `statistics`: the running ones of every BatchNorm, float32; `synchronised`:
    what BatchNorm over all ranks (`--sync-bn`) sends, forward and backward.
    """

    gradients: int
    statistics: int
    synchronised: int
    messages: int

    @property
    def bytes(self) -> int:
        """All together."""
        return self.gradients + self.statistics + self.synchronised


def ring_seconds(size: float, ranks: int, bandwidth: float, hop: float) -> float:
    """Of adding up `size` bytes over a ring: 2 (n - 1) (size / n / bandwidth + hop); 0 for one rank."""
    return 2 * (ranks - 1) * (size / ranks / bandwidth + hop)


def exchange_of(work: StepWork, config: Config) -> Exchange:
    """What a resolved configuration's step adds up: a message of gradients, one of statistics.

    With `--sync-bn`, each call of a norm adds two messages forward, a mean's and a variance's, and, of those
    that learn, one of both backward.
    """
    width = BFLOAT16 if config.dist.reduce_dtype == "bfloat16" else FLOAT32
    network = work.network
    all_peers = [each for each, times in network.of_peers(work.num_peers) for _ in range(times)]
    trunk, branches, head = (_norms(part) for part in (network.trunk, all_peers, work.over_all))
    networks = 1 + (work.teacher != "none")
    # numbers of all statistics: a mean and a variance a channel
    once = sum(trunk) + sum(branches) + sum(head)
    teaching = work.teacher == "train"
    passes = (2 + teaching) if config.sync_bn else 0
    calls = len(trunk) + len(branches) + len(head)
    return Exchange(
        gradients=width * work.parameters,
        statistics=FLOAT32 * networks * once,
        synchronised=FLOAT32 * passes * (work.num_views * sum(trunk) + sum(branches) + sum(head)),
        messages=2 + (3 + 2 * teaching) * calls * config.sync_bn,
    )


def _norms(operations: Iterable[Operation]) -> list[int]:
    """Of each norm the numbers of its statistics, as many as its weights and biases."""
    return [each.parameters for each in operations if each.kind == "norm"]
