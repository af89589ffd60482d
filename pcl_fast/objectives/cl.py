"""Collaborative learning, Song and Chai, NeurIPS 2018, with shared intermediate representations (CL-ILR)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from pcl_fast.config import ClConfig
from pcl_fast.contract import PeerOutputs
from pcl_fast.objectives.base import Deployment, Objective, full_precision, of_each, peer_cross_entropies


class CollaborativeLearning(Objective):
    """L_h = b CE(z_h, y) + (1 - b) T^2 CE(q_h, p_h^T), with q_h = softmax(mean of the other heads' z / T).

    Targets q are detached. The gradient that enters the trunk is divided by the number of heads.
    """

    num_views = 1
    has_ensemble = False
    uses_mean_teacher = False
    ramps_up = False
    deployment = Deployment("student", peer=0)
    headline = {"CL": "peer1"}  # noqa: RUF012

    def __init__(self, options: ClConfig) -> None:
        self.options = options
        self.num_peers = options.num_heads
        self.split_gradient = 1 / options.num_heads
        self.term_names = (*of_each("ce", self.num_peers), *of_each("cl", self.num_peers))

    def terms(
        self, student: PeerOutputs, teacher: PeerOutputs | None, labels_B: Tensor, weight: float | Tensor
    ) -> Tensor:
        """What heads learn from labels, then from each other, with its share: [2 m]; w(e) is not used."""
        beta, temperature = self.options.beta, self.options.temperature
        logits_VBC = full_precision(student.logits_VBC)
        others_VBC = (logits_VBC.sum(0) - logits_VBC).detach() / (len(logits_VBC) - 1)
        q_VBC = F.softmax(others_VBC / temperature, dim=-1)
        soft_V = -(q_VBC * F.log_softmax(logits_VBC / temperature, dim=-1)).sum(-1).mean(-1)
        hard_V = peer_cross_entropies(logits_VBC, labels_B)
        return torch.cat([beta * hard_V, (1 - beta) * temperature**2 * soft_V])
