"""Two-stage knowledge distillation, Hinton, Vinyals and Dean, 2015: a trained teacher teaches one network."""

import torch
from torch import Tensor

from pcl_fast.config import KdConfig
from pcl_fast.contract import PeerOutputs
from pcl_fast.objectives.base import Deployment, Objective, full_precision, peer_cross_entropies
from pcl_fast.objectives.pcl import ensemble_distillation


class Distillation(Objective):
    """L = CE(z, y) + a T^2 KL(p_teacher^T || p^T), the trained teacher in eval mode, on the same view."""

    num_peers = 1
    num_views = 1
    has_ensemble = False
    uses_mean_teacher = False
    ramps_up = False
    uses_trained_teacher = True
    deployment = Deployment("student")
    headline = {"KD": "peer1"}  # noqa: RUF012
    term_names = ("ce/peer1", "kd/peer1")

    def __init__(self, options: KdConfig) -> None:
        self.options = options

    def terms(
        self, student: PeerOutputs, teacher: PeerOutputs | None, labels_B: Tensor, weight: float | Tensor
    ) -> Tensor:
        """What the network learns from labels, and from the teacher: [2]; w(e) is not used."""
        assert teacher is not None, "two-stage distillation needs its teacher"
        logits_VBC = full_precision(student.logits_VBC)
        teacher_BC = full_precision(teacher.logits_VBC[0]).detach()
        taught_1 = ensemble_distillation(teacher_BC, logits_VBC, self.options.temperature)
        return torch.cat([peer_cross_entropies(logits_VBC, labels_B), self.options.alpha * taught_1])
