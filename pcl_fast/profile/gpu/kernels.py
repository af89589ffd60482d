"""Our kernels of the update and of the loss: against the bytes they must move, and against plain torch."""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from pcl_fast.config import PclConfig
from pcl_fast.contract import PeerOutputs
from pcl_fast.kernels import pcl_loss, sgd_ema
from pcl_fast.kernels.pcl_loss import LossRule
from pcl_fast.kernels.sgd_ema import FlatBuffers, SgdRule
from pcl_fast.objectives.pcl import Pcl
from pcl_fast.profile.gpu.bench import Bench, Row

WEIGHTS = (1_000_000, 25_000_000, 100_000_000)
UPDATE_BYTES, HELD_BYTES = 32, 20  # a weight: moved, and in memory
CASES = tuple((batch, classes) for batch in (128, 256) for classes in (10, 100, 1000))
PEERS = 3
UNCACHED = 256 << 20  # bytes that no cache holds: buffers take turns until they are that many
LAUNCHES = 20  # in a graph, at least

Update = Callable[[FlatBuffers, SgdRule, Tensor, Tensor, Tensor], None]


def measure_updates(bench: Bench) -> None:
    """`sgd_ema` of so many weights."""
    from pcl_fast.kernels.sgd_ema_triton import sgd_ema_triton

    updates: dict[str, Update] = {"ours": sgd_ema_triton, "torch": sgd_ema.reference}
    for weights in bench.pick(WEIGHTS, (3000,)):
        for by, update in updates.items():
            about = {"what": "update", "by": by, "weights": weights, "bytes": UPDATE_BYTES * weights}
            bench.attempt(about, partial(_update, bench, update, weights))


def _update(bench: Bench, update: Update, weights: int) -> Row:
    sets = 1 if bench.tiny else math.ceil(UNCACHED / (HELD_BYTES * weights))
    rule = SgdRule(momentum=0.9, weight_decay=5e-4, nesterov=True)
    lr, phi = (torch.full((), value, dtype=torch.float64, device=bench.device) for value in (1e-3, 0.999))
    stop = torch.zeros((), device=bench.device)
    turns = [partial(update, _buffers(weights, bench.device), rule, lr, phi, stop) for _ in range(sets)]
    return {"sets": sets, "seconds": bench.time_graph(turns, 1 if bench.tiny else LAUNCHES)}


def _buffers(weights: int, device: torch.device) -> FlatBuffers:
    values, gradients, momentum, averages = (torch.randn(weights, device=device) for _ in range(4))
    halves = values.bfloat16(), averages.bfloat16()
    return FlatBuffers(
        values=values,
        gradients=gradients,
        momentum=momentum.zero_(),
        averages=averages,
        half_values=halves[0],
        half_averages=halves[1],
    )


def measure_losses(bench: Bench) -> None:
    """PCL's losses and gradients of three peers: our kernel, its formula in plain torch, and autograd."""
    from pcl_fast.kernels.pcl_loss_triton import pcl_loss_triton

    for batch, classes in bench.pick(CASES, ((4, 10),)):
        logits = _Logits(batch, classes, bench.device)
        ways = {
            "ours": partial(logits.closed, pcl_loss_triton),
            "torch": partial(logits.closed, pcl_loss.reference),
            "autograd": logits.by_autograd,
        }
        for by, way in ways.items():
            about = {"what": "loss", "by": by, "batch": batch, "classes": classes, "bytes": logits.bytes}
            bench.attempt(about, partial(_loss, bench, way))


def _loss(bench: Bench, way: Callable[[], None]) -> Row:
    return {"seconds": bench.time_graph([way], 1 if bench.tiny else LAUNCHES)}


class _Logits:
    """Of peers, ensemble and mean teachers, in bfloat16 as the networks give them; and labels."""

    def __init__(self, batch: int, classes: int, device: torch.device) -> None:
        def draw(*shape: int) -> Tensor:
            return (3 * torch.randn(*shape, batch, classes, device=device)).bfloat16()

        self.peers_VBC, self.ensemble_BC = draw(PEERS).requires_grad_(), draw().requires_grad_()
        self.teachers_VBC = draw(PEERS)
        self.labels_B = torch.randint(classes, (batch,), device=device)
        self.weight = torch.full((), 0.7, dtype=torch.float64, device=device)
        self.bytes = 2 * batch * classes * (3 * PEERS + 2)  # logits read, gradients written
        self.pcl = Pcl(PclConfig(num_peers=PEERS))

    def closed(self, loss: Callable[..., object]) -> None:
        rule = LossRule(temperature=3.0, ensemble_teacher=True, mean_teachers=True)
        given = (self.peers_VBC.detach(), self.ensemble_BC.detach(), self.teachers_VBC)
        loss(*given, self.labels_B, self.weight, rule)

    def by_autograd(self) -> None:
        student = PeerOutputs(self.peers_VBC, (), self.ensemble_BC)
        teacher = PeerOutputs(self.teachers_VBC, (), None)
        terms = self.pcl.terms(student, teacher, self.labels_B, self.weight)
        torch.autograd.grad(terms.sum(), (self.peers_VBC, self.ensemble_BC))
