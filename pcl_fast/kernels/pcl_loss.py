"""PCL's loss and its gradients with respect to all logits, without autograd: closed forms.

With p = softmax(z) and p^T = softmax(z / T), B samples and targets that are constants:
d CE(z, y) / dz = (p - onehot(y)) / B and d T^2 KL(q || p^T) / dz = T (p^T - q) / B.

In Triton all of it is two launches. Of C classes and m peers they read the (2 m + 1) C logits of a sample
from memory once (what reads them again finds them in the cache) and write (m + 1) C gradients: for m = 3 and
bfloat16, 22 bytes a class and sample.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pcl_fast.device import has_triton

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True, kw_only=True)
class LossRule:
    """The temperature T, and which distillation losses there are: L_pe, L_pm."""

    temperature: float
    ensemble_teacher: bool
    mean_teachers: bool

    def num_terms(self, peers: int) -> int:
        """How many terms the loss of that many peers has."""
        return peers + 1 + peers * (self.ensemble_teacher + self.mean_teachers)


@dataclass(frozen=True, slots=True)
class PclLoss:
    """What the loss says of a batch.

    `terms` [terms] in float32 (float64 if the logits are): ce/peer1..m, ce/ensemble, then, as far as the
    rule has them, pe/peer1..m, pm/peer1..m; means over the batch, weighted, their sum is the loss.
    `correct` [m + 1] in int64: right top-1 answers of each peer, then of the ensemble; of equal logits the
    first counts. The gradients are those of the sum of the terms, in the type of their logits.
    """

    terms: Tensor
    correct: Tensor
    grad_logits_VBC: Tensor
    grad_ensemble_BC: Tensor


def pcl_loss(
    logits_VBC: Tensor,
    ensemble_BC: Tensor,
    teacher_VBC: Tensor | None,
    labels_B: Tensor,
    weight: Tensor,
    rule: LossRule,
) -> PclLoss:
    """PCL's loss of peers, ensemble teacher and mean teachers, and its gradients, in float32 at least.

    `weight` is w(e), of shape [] on the logits' device, where alone it is read: nothing waits, and a CUDA
    graph can capture it. Soft targets are constants: of the ensemble's logits only their cross-entropy has
    a gradient. What is not a number among the logits makes terms that are not.
    """
    peers, batch, classes = logits_VBC.shape
    assert ensemble_BC.shape == (batch, classes), (ensemble_BC.shape, logits_VBC.shape)
    assert labels_B.shape == (batch,), labels_B.shape
    assert labels_B.dtype == torch.int64, labels_B.dtype
    if rule.mean_teachers:
        assert teacher_VBC is not None, "L_pm needs the mean teachers' logits"
        assert teacher_VBC.shape == logits_VBC.shape, (teacher_VBC.shape, logits_VBC.shape)
        assert peers > 1, "no peer is taught by its own mean teacher"
    if takes(logits_VBC, ensemble_BC, teacher_VBC):
        from pcl_fast.kernels.pcl_loss_triton import pcl_loss_triton

        return pcl_loss_triton(logits_VBC, ensemble_BC, teacher_VBC, labels_B, weight, rule)
    return reference(logits_VBC, ensemble_BC, teacher_VBC, labels_B, weight, rule)


def takes(logits_VBC: Tensor, ensemble_BC: Tensor, teacher_VBC: Tensor | None) -> bool:
    """Whether the Triton kernel can be used: float32, bfloat16 or float16 on a CUDA device."""
    given = [tensor for tensor in (logits_VBC, ensemble_BC, teacher_VBC) if tensor is not None]
    return all(tensor.is_cuda and tensor.dtype in FLOATS for tensor in given) and has_triton()


@torch.no_grad()
def reference(
    logits_VBC: Tensor,
    ensemble_BC: Tensor,
    teacher_VBC: Tensor | None,
    labels_B: Tensor,
    weight: Tensor,
    rule: LossRule,
) -> PclLoss:
    """The same in plain torch, which is also what a CPU runs. H are the heads: the peers, the ensemble."""
    heads_HBC = torch.cat([_full(logits_VBC), _full(ensemble_BC)[None]])
    places_HB1 = labels_B.expand(len(heads_HBC), -1)[..., None]
    log_p_HBC = F.log_softmax(heads_HBC, -1)
    terms = [-log_p_HBC.gather(-1, places_HB1).mean((1, 2))]
    correct = (heads_HBC.argmax(-1) == labels_B).sum(-1)
    onehot_BC = torch.arange(heads_HBC.shape[-1], device=labels_B.device) == labels_B[:, None]
    gradients_HBC = log_p_HBC.exp_().sub_(onehot_BC.to(log_p_HBC.dtype))
    softened_HBC = heads_HBC.div_(rule.temperature)
    log_p_VBC = F.log_softmax(softened_HBC[:-1], -1)
    p_VBC, weight = log_p_VBC.exp(), weight.to(log_p_VBC.dtype)
    for targets_VBC, negentropies_VB in _soft_targets(softened_HBC[-1], teacher_VBC, rule):
        divergences_VB = negentropies_VB - (targets_VBC * log_p_VBC).sum(-1)
        terms.append(weight * rule.temperature**2 * divergences_VB.mean(-1))
        gradients_HBC[:-1].addcmul_(p_VBC - targets_VBC, weight, value=rule.temperature)
    gradients_HBC.div_(len(labels_B))
    return PclLoss(
        terms=torch.cat(terms),
        correct=correct,
        grad_logits_VBC=gradients_HBC[:-1].to(logits_VBC.dtype),
        grad_ensemble_BC=gradients_HBC[-1].to(ensemble_BC.dtype),
    )


def _soft_targets(
    softened_ensemble_BC: Tensor, teacher_VBC: Tensor | None, rule: LossRule
) -> Iterator[tuple[Tensor, Tensor]]:
    """Targets q of every peer, [V, B, C] or one for all, and sum q log q: the ensemble's, the teachers'."""
    if rule.ensemble_teacher:
        log_q_BC = F.log_softmax(softened_ensemble_BC, -1)
        q_BC = log_q_BC.exp()
        yield q_BC, (q_BC * log_q_BC).sum(-1)
    if rule.mean_teachers:
        assert teacher_VBC is not None
        others = len(teacher_VBC) - 1
        log_q_VBC = F.log_softmax(_full(teacher_VBC) / rule.temperature, -1)
        q_VBC = log_q_VBC.exp()
        negentropies_VB = (q_VBC * log_q_VBC).sum(-1)
        # KL is linear in q and in q log q: the mean of the other teachers is that of all less one's own.
        yield (q_VBC.sum(0) - q_VBC) / others, (negentropies_VB.sum(0) - negentropies_VB) / others


def _full(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
