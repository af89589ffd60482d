"""Online knowledge distillation with diverse peers (OKDDip), Chen et al., AAAI 2020."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcl_fast.config import OkddipConfig
from pcl_fast.contract import HeadOutputs, HeadShapes, PeerHead, PeerOutputs, PeerParts
from pcl_fast.objectives.base import Deployment, Objective, full_precision, of_each, peer_cross_entropies
from pcl_fast.objectives.pcl import ensemble_distillation


class Attention(PeerHead):
    """t_a = sum_b alpha_ab z_b over all peers but the last, the leader; z of all is their mean.

    alpha_a = softmax_b((W_q h_a) . (W_k h_b)), a itself included, with W_q and W_k from F to F / 8, without
    bias. Targets hold z still and let alpha learn, which has nothing else to learn from.
    """

    def __init__(self, shapes: HeadShapes) -> None:
        super().__init__()
        width = max(1, shapes.feature_dim // 8)
        self.query = nn.Linear(shapes.feature_dim, width, bias=False)
        self.key = nn.Linear(shapes.feature_dim, width, bias=False)

    def forward(self, parts: PeerParts) -> HeadOutputs:
        """The peers' mean logits, and the target of each of them."""
        features_BVF = torch.stack(tuple(parts.features[:-1]), dim=1)
        logits_BVC = full_precision(torch.stack(tuple(parts.logits[:-1]), dim=1))
        likeness_BVV = self.query(features_BVF) @ self.key(features_BVF).transpose(1, 2)
        alpha_BVV = F.softmax(full_precision(likeness_BVV), dim=-1)
        targets_BVC = (alpha_BVV[..., None] * logits_BVC.detach()[:, None]).sum(2)
        return HeadOutputs(logits_BVC.mean(1), targets_BVC.transpose(0, 1))


class DiversePeers(Objective):
    """Peers: CE + w(e) T^2 KL(t_a || p_a). Leader: CE + w(e) T^2 KL(mean of the peers || p_L), detached.

    All see one view. The leader is the last of `num_peers`, and what is deployed.
    """

    num_views = 1
    has_ensemble = True
    uses_mean_teacher = False
    make_head = Attention

    def __init__(self, options: OkddipConfig) -> None:
        self.options = options
        self.num_peers = options.num_peers + 1
        self.deployment = Deployment("student", peer=options.num_peers)
        self.headline = {"OKDDip": f"peer{self.num_peers}", "OKDDip-E": "ensemble"}
        self.term_names = (*of_each("ce", self.num_peers), *of_each("kd", self.num_peers))

    def terms(
        self, student: PeerOutputs, teacher: PeerOutputs | None, labels_B: Tensor, weight: float | Tensor
    ) -> Tensor:
        """Cross-entropies, then what peers learn from their targets, and the leader from all: [2 (m + 1)]."""
        assert student.targets_KBC is not None, "OKDDip needs its attention"
        assert student.ensemble_logits_BC is not None, "the leader needs the peers' mean"
        logits_VBC = full_precision(student.logits_VBC)
        mean_BC = full_precision(student.ensemble_logits_BC).detach()
        targets_VBC = torch.cat([full_precision(student.targets_KBC), mean_BC[None]])
        taught_V = ensemble_distillation(targets_VBC, logits_VBC, self.options.temperature)
        return torch.cat([peer_cross_entropies(logits_VBC, labels_B), weight * taught_V])
