"""Knowledge distillation via collaborative learning (KDCL), Guo et al., CVPR 2020."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from pcl_fast.config import KdclConfig
from pcl_fast.contract import PeerOutputs
from pcl_fast.objectives.base import (
    Deployment,
    Objective,
    class_weights,
    full_precision,
    label_logits,
    of_each,
    peer_cross_entropies,
)
from pcl_fast.objectives.combination import best_weights
from pcl_fast.objectives.pcl import ensemble_distillation

RIDGE = 1e-3  # of the mean of C's diagonal, added to it: C may be singular, and is measured


class Kdcl(Objective):
    """L_i = CE(z_i, y) + w T^2 KL(p_t^T || p_i^T), each network on views of its own, target detached.

    The target z_t is one for all networks: `naive_target`, `linear_target` or `minlogit_target`; or general,
    sum_i w_i z_i with the `least_error_weights` of held-out images, equal until those were looked at.
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
        self.wants_held_out = options.target == "general"
        if self.wants_held_out:
            self.memory = {"weights": torch.full((self.num_peers,), 1 / self.num_peers, dtype=torch.float64)}

    def terms(
        self, student: PeerOutputs, teacher: PeerOutputs | None, labels_B: Tensor, weight: float | Tensor
    ) -> Tensor:
        """Cross-entropies, then what each learns from the target: [2 m]; w(e) is not used."""
        logits_VBC = full_precision(student.logits_VBC)
        with torch.no_grad():
            target_BC = self._target(logits_VBC, labels_B)
        taught_V = ensemble_distillation(target_BC, logits_VBC, self.options.temperature)
        return torch.cat([peer_cross_entropies(logits_VBC, labels_B), self.options.weight * taught_V])

    def _target(self, logits_VBC: Tensor, labels_B: Tensor) -> Tensor:
        if self.wants_held_out:
            weights_V = self.memory["weights"].to(logits_VBC.dtype)
            return (weights_V[:, None, None] * logits_VBC).sum(0)
        return TARGETS[self.options.target](logits_VBC, labels_B)

    def observe(self, student: PeerOutputs, labels_B: Tensor) -> Tensor:
        """Products of the networks' errors f_i - t, f = softmax, summed over images and classes: [V, V]."""
        probabilities_VBC = student.logits_VBC.double().softmax(-1)
        errors_VN = (probabilities_VBC - class_weights(probabilities_VBC, labels_B)).flatten(1)
        return errors_VN @ errors_VN.t()

    def conclude(self, sums: Tensor, images: int) -> None:
        """Weigh the networks anew; as before if a network has said what is not finite."""
        if sums.isfinite().all():
            self.memory["weights"].copy_(least_error_weights(sums / images))


def least_error_weights(errors_VV: Tensor) -> Tensor:
    """The weights whose sum is 1 with the least w^T C w: C^-1 1 / (1^T C^-1 1), float64 [V].

    Some may be negative. None can be large: the square of their norm is at most 1 + 1 / `RIDGE`.
    """
    scale = errors_VV.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny)
    one_V = torch.ones_like(errors_VV[0])
    solved_V = torch.linalg.solve(errors_VV / scale + RIDGE * one_V.diag(), one_V)
    return solved_V / solved_V.sum()


def naive_target(logits_VBC: Tensor, labels_B: Tensor) -> Tensor:
    """For each image the logits of the network with the lowest cross-entropy: [B, C]."""
    best_B = label_logits(F.log_softmax(logits_VBC, dim=-1), labels_B).argmax(0)
    return logits_VBC.gather(0, best_B[None, :, None].expand(1, -1, logits_VBC.shape[-1]))[0]


def minlogit_target(logits_VBC: Tensor, labels_B: Tensor) -> Tensor:
    """For each class the least of the networks' logits, each less its logit <y, z> of the label: [B, C]."""
    return (logits_VBC - label_logits(logits_VBC, labels_B)[..., None]).amin(0)


def linear_target(logits_VBC: Tensor, labels_B: Tensor) -> Tensor:
    """For each image the convex combination of the networks' logits with the lowest cross-entropy: [B, C]."""
    weights_BV = best_weights(logits_VBC, labels_B).to(logits_VBC.dtype)
    return (weights_BV.t()[..., None] * logits_VBC).sum(0)


TARGETS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "naive": naive_target,
    "linear": linear_target,
    "minlogit": minlogit_target,
}
