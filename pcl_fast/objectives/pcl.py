"""Peer Collaborative Learning, Wu and Gong, AAAI 2021 (arXiv 2006.04147v2), equations 1 to 6."""

import torch
import torch.nn.functional as F
from torch import Tensor

from pcl_fast.config import PclConfig
from pcl_fast.contract import PeerOutputs
from pcl_fast.kernels.pcl_loss import LossRule, pcl_loss, takes
from pcl_fast.objectives.base import (
    Deployment,
    Loss,
    Objective,
    full_precision,
    is_soft,
    peer_cross_entropies,
)


class Pcl(Objective):
    """L = sum_j CE(z_j, y) + CE(z_t, y) + L_pe + L_pm, with the options of `PclConfig`."""

    deployment = Deployment("mean_teacher", peer=0)
    headline = {"PCL": "mean_teacher1", "PCL-E": "mean_ensemble"}  # noqa: RUF012
    has_ensemble = True
    uses_mean_teacher = True

    def __init__(self, options: PclConfig) -> None:
        self.options = options
        self.num_peers = options.num_peers
        self.num_views = options.num_peers if options.view_per_peer else 1
        self.others_teach = options.mean_teacher and options.num_peers > 1
        self.term_names = self._names()

    def _names(self) -> tuple[str, ...]:
        of_others = "ml" if self.options.mutual_learning else "pm"
        kinds = ["ce"] + ["pe"] * self.options.ensemble_teacher + [of_others] * self.others_teach
        names = [f"{kind}/peer{j + 1}" for kind in kinds for j in range(self.num_peers)]
        return (*names[: self.num_peers], "ce/ensemble", *names[self.num_peers :])

    def terms(
        self, student: PeerOutputs, teacher: PeerOutputs | None, labels_B: Tensor, weight: float | Tensor
    ) -> Tensor:
        """Cross-entropies of the peers and the ensemble teacher, then L_pe and L_pm of each peer."""
        assert student.ensemble_logits_BC is not None, "the ensemble teacher needs its classifier"
        ensemble_BC = full_precision(student.ensemble_logits_BC)
        logits_VBC = full_precision(student.logits_VBC)
        temperature = self.options.temperature
        losses = [peer_cross_entropies(logits_VBC, labels_B), F.cross_entropy(ensemble_BC, labels_B)[None]]
        if self.options.ensemble_teacher:
            target_BC = ensemble_BC.detach() if self.options.detach_ensemble else ensemble_BC
            losses.append(weight * ensemble_distillation(target_BC, logits_VBC, temperature))
        teacher_VBC = self._other_teachers(student, teacher)
        if teacher_VBC is not None:
            teacher_VBC = full_precision(teacher_VBC)
            losses.append(weight * mean_teacher_distillation(teacher_VBC, logits_VBC, temperature))
        return torch.cat(losses)

    def _other_teachers(self, student: PeerOutputs, teacher: PeerOutputs | None) -> Tensor | None:
        """The logits by which peers learn from each other: the mean teachers', or their own; None without."""
        if not self.others_teach:
            return None
        if self.options.mutual_learning:
            return student.logits_VBC.detach()
        assert teacher is not None, "L_pm needs the mean teachers' logits"
        return teacher.logits_VBC.detach()

    def loss(
        self, student: PeerOutputs, teacher: PeerOutputs | None, labels_B: Tensor, weight: Tensor
    ) -> Loss:
        """The same; by one kernel where there is one for it, which takes no soft labels."""
        ensemble_BC = student.ensemble_logits_BC
        assert ensemble_BC is not None, "the ensemble teacher needs its classifier"
        teacher_VBC = self._other_teachers(student, teacher)
        fused = self.options.detach_ensemble and not is_soft(labels_B)
        if not fused or not takes(student.logits_VBC, ensemble_BC, teacher_VBC):
            return super().loss(student, teacher, labels_B, weight)
        rule = LossRule(
            temperature=self.options.temperature,
            ensemble_teacher=self.options.ensemble_teacher,
            mean_teachers=self.others_teach,
        )
        made = pcl_loss(student.logits_VBC, ensemble_BC, teacher_VBC, labels_B, weight, rule)
        seeds = made.grad_logits_VBC, made.grad_ensemble_BC
        return Loss(made.terms, made.correct, (student.logits_VBC, ensemble_BC), seeds)


def ensemble_distillation(teacher: Tensor, peers_VBC: Tensor, temperature: float) -> Tensor:
    """T^2 KL(p_t^T || p_j^T) for every peer j: [V] (PCL eq. 3, L_pe without its weight).

    `teacher`: the logits of one for all peers, [B, C], or of one for each, [V, B, C].
    """
    teacher_log = F.log_softmax(teacher / temperature, dim=-1)
    peers_log_VBC = F.log_softmax(peers_VBC / temperature, dim=-1)
    divergence_VBC = teacher_log.exp() * (teacher_log - peers_log_VBC)
    return temperature**2 * divergence_VBC.sum(-1).mean(-1)


def mean_teacher_distillation(teachers_VBC: Tensor, peers_VBC: Tensor, temperature: float) -> Tensor:
    """T^2 / (m - 1) sum_{k != j} KL(q_k^T || p_j^T) for every peer j: [V] (PCL eq. 5, L_pm).

    The KL is linear in q_k log q_k and in q_k, so the sum over the other teachers is the sum over all
    less peer j's own: no loop over pairs, and no peer is taught by its own mean teacher.
    """
    others = peers_VBC.shape[0] - 1
    teachers_log_VBC = F.log_softmax(teachers_VBC / temperature, dim=-1)
    q_VBC = teachers_log_VBC.exp()
    negentropy_VB = (q_VBC * teachers_log_VBC).sum(-1)
    other_q_VBC = (q_VBC.sum(0) - q_VBC) / others
    other_negentropy_VB = (negentropy_VB.sum(0) - negentropy_VB) / others
    peers_log_VBC = F.log_softmax(peers_VBC / temperature, dim=-1)
    divergence_VB = other_negentropy_VB - (other_q_VBC * peers_log_VBC).sum(-1)
    return temperature**2 * divergence_VB.mean(-1)
