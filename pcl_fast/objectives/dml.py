"""Deep mutual learning, Zhang et al., CVPR 2018."""

import torch
from torch import Tensor

from pcl_fast.config import DmlConfig
from pcl_fast.contract import PeerOutputs
from pcl_fast.objectives.base import Deployment, Objective, full_precision, of_each, peer_cross_entropies
from pcl_fast.objectives.pcl import mean_teacher_distillation


class MutualLearning(Objective):
    """L_j = CE(z_j, y) + w T^2 / (m - 1) sum_{k != j} KL(p_k || p_j), targets detached, for networks in step.

    All see one view of an image and are updated at once; the authors update one after the other.
    """

    num_views = 1
    has_ensemble = False
    uses_mean_teacher = False
    ramps_up = False
    deployment = Deployment("student", peer=0)
    headline = {"DML": "peer1"}  # noqa: RUF012

    def __init__(self, options: DmlConfig) -> None:
        self.options = options
        self.num_peers = options.num_peers
        self.shares_trunk = not options.separate
        self.term_names = (*of_each("ce", self.num_peers), *of_each("ml", self.num_peers))

    def terms(
        self, student: PeerOutputs, teacher: PeerOutputs | None, labels_B: Tensor, weight: float | Tensor
    ) -> Tensor:
        """Cross-entropies, then what each learns from the others: [2 m]; w(e) is not used."""
        logits_VBC = full_precision(student.logits_VBC)
        mutual_V = mean_teacher_distillation(logits_VBC.detach(), logits_VBC, self.options.temperature)
        return torch.cat([peer_cross_entropies(logits_VBC, labels_B), self.options.weight * mutual_V])
