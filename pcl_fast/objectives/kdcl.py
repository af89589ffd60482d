"""Knowledge distillation via collaborative learning (KDCL), Guo et al., CVPR 2020."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from pcl_fast.config import KdclConfig
from pcl_fast.contract import PeerOutputs
from pcl_fast.objectives.base import Deployment, Objective, full_precision, of_each, peer_cross_entropies
from pcl_fast.objectives.combination import best_weights
from pcl_fast.objectives.pcl import ensemble_distillation


class Kdcl(Objective):
    """L_i = CE(z_i, y) + w T^2 KL(p_t^T || p_i^T), each network on views of its own, target detached.

    The target z_t is one for all networks: `naive_target`, `linear_target` or `minlogit_target`. The authors'
    fourth (general) weighs networks by their errors on held-out images and is not here.
    """

    has_ensemble = False
    uses_mean_teacher = False
    ramps_up = False
    deployment = Deployment("student", peer=0)
    headline = {"KDCL": "peer1"}  # noqa: RUF012

    def __init__(self, options: KdclConfig) -> None:
        self.options = options
        self.num_peers = self.num_views = options.num_peers
        self.shares_trunk = not options.separate
        self.term_names = (*of_each("ce", self.num_peers), *of_each("kd", self.num_peers))

    def terms(
        self, student: PeerOutputs, teacher: PeerOutputs | None, labels_B: Tensor, weight: float | Tensor
    ) -> Tensor:
        """Cross-entropies, then what each learns from the target: [2 m]; w(e) is not used."""
        logits_VBC = full_precision(student.logits_VBC)
        with torch.no_grad():
            target_BC = TARGETS[self.options.target](logits_VBC, labels_B)
        taught_V = ensemble_distillation(target_BC, logits_VBC, self.options.temperature)
        return torch.cat([peer_cross_entropies(logits_VBC, labels_B), self.options.weight * taught_V])


def naive_target(logits_VBC: Tensor, labels_B: Tensor) -> Tensor:
    """For each image the logits of the network with the lowest cross-entropy: [B, C]."""
    losses_VB = -F.log_softmax(logits_VBC, dim=-1).gather(-1, _of_labels(logits_VBC, labels_B))[..., 0]
    best_B = losses_VB.argmin(0)
    return logits_VBC.gather(0, best_B[None, :, None].expand(1, -1, logits_VBC.shape[-1]))[0]


def minlogit_target(logits_VBC: Tensor, labels_B: Tensor) -> Tensor:
    """For each class the least of the networks' logits, each less its logit of the label: [B, C]."""
    return (logits_VBC - logits_VBC.gather(-1, _of_labels(logits_VBC, labels_B))).amin(0)


def linear_target(logits_VBC: Tensor, labels_B: Tensor) -> Tensor:
    """For each image the convex combination of the networks' logits with the lowest cross-entropy: [B, C]."""
    weights_BV = best_weights(logits_VBC, labels_B).to(logits_VBC.dtype)
    return (weights_BV.t()[..., None] * logits_VBC).sum(0)


def _of_labels(logits_VBC: Tensor, labels_B: Tensor) -> Tensor:
    return labels_B[None, :, None].expand(len(logits_VBC), -1, 1)


TARGETS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "naive": naive_target,
    "linear": linear_target,
    "minlogit": minlogit_target,
}
