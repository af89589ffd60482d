"""Knowledge distillation by on-the-fly native ensemble (ONE), Lan et al., NeurIPS 2018."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcl_fast.config import OneConfig
from pcl_fast.contract import HeadOutputs, HeadShapes, PeerHead, PeerOutputs, PeerParts
from pcl_fast.errors import ConfigError
from pcl_fast.objectives.base import Deployment, Objective, full_precision, of_each, peer_cross_entropies
from pcl_fast.objectives.pcl import ensemble_distillation


class Gate(PeerHead):
    """z_e = sum_j g_j z_j, with g = softmax(ReLU(BN(FC(pool(trunk map))))), weights of each image."""

    def __init__(self, shapes: HeadShapes) -> None:
        super().__init__()
        if not shapes.trunk_channels:
            raise ConfigError(
                "--method one: the gate pools a map [B, C, H, W], and the trunk makes none; "
                "give a --split where there is one, or another --model"
            )
        self.score = nn.Linear(shapes.trunk_channels, shapes.num_peers)
        self.norm = nn.BatchNorm2d(shapes.num_peers)  # of maps of one pixel, as those know of other ranks

    def forward(self, parts: PeerParts) -> HeadOutputs:
        """The gated ensemble's logits."""
        pooled_BC = parts.trunk_map_BCHW.mean((2, 3))
        scores_BV = self.norm(self.score(pooled_BC)[..., None, None])[..., 0, 0]
        gates_BV = F.softmax(full_precision(F.relu(scores_BV)), dim=-1)
        logits_BVC = full_precision(torch.stack(tuple(parts.logits), dim=1))
        return HeadOutputs((gates_BV[..., None] * logits_BVC).sum(1))


class NativeEnsemble(Objective):
    """L = sum_j CE(z_j, y) + CE(z_e, y) + w(e) T^2 sum_j KL(p_e^T || p_j^T), target detached, one view."""

    num_views = 1
    has_ensemble = True
    uses_mean_teacher = False
    deployment = Deployment("student", peer=0)
    headline = {"ONE": "peer1", "ONE-E": "ensemble"}  # noqa: RUF012
    make_head = Gate

    def __init__(self, options: OneConfig) -> None:
        self.options = options
        self.num_peers = options.num_peers
        peers = self.num_peers
        self.term_names = (*of_each("ce", peers), "ce/ensemble", *of_each("kd", peers))

    def terms(
        self, student: PeerOutputs, teacher: PeerOutputs | None, labels_B: Tensor, weight: float | Tensor
    ) -> Tensor:
        """Cross-entropies of branches and ensemble, then what each branch learns from it: [2 m + 1]."""
        assert student.ensemble_logits_BC is not None, "ONE needs its gate"
        ensemble_BC, logits_VBC = (
            full_precision(z) for z in (student.ensemble_logits_BC, student.logits_VBC)
        )
        taught_V = ensemble_distillation(ensemble_BC.detach(), logits_VBC, self.options.temperature)
        hard = [peer_cross_entropies(logits_VBC, labels_B), F.cross_entropy(ensemble_BC, labels_B)[None]]
        return torch.cat([*hard, weight * taught_V])
