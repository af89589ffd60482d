"""Feature fusion for online mutual knowledge distillation (FFL), Kim et al., ICPR 2020."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcl_fast.config import FflConfig
from pcl_fast.contract import HeadOutputs, HeadShapes, PeerHead, PeerOutputs, PeerParts
from pcl_fast.errors import ConfigError
from pcl_fast.objectives.base import Deployment, Objective, full_precision, of_each, peer_cross_entropies
from pcl_fast.objectives.pcl import ensemble_distillation


class Fusion(PeerHead):
    """The fused classifier: all last maps, 3x3 depthwise, 1x1 to a peer's channels, pooled, classified.

    The channels are the first peer's. A BatchNorm and a ReLU follow each convolution.
    """

    wants_maps = True

    def __init__(self, shapes: HeadShapes) -> None:
        super().__init__()
        if not shapes.map_shapes:
            raise ConfigError(
                "--method ffl: it fuses maps [B, C, H, W], and the branches make none; "
                "give an earlier --split, or another --model"
            )
        sizes = {shape[1:] for shape in shapes.map_shapes}
        if len(sizes) > 1:
            listed = ", ".join(" x ".join(map(str, shape[1:])) for shape in shapes.map_shapes)
            raise ConfigError(
                f"--method ffl: it fuses maps of one size, and the branches' are {listed}; "
                "give --model backbones that end in maps of one size"
            )
        wide, channels = sum(shape[0] for shape in shapes.map_shapes), shapes.map_shapes[0][0]
        self.depthwise = nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False)
        self.norm1 = nn.BatchNorm2d(wide)
        self.pointwise = nn.Conv2d(wide, channels, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.classifier = nn.Linear(channels, shapes.num_classes)

    def forward(self, parts: PeerParts) -> HeadOutputs:
        """The fused logits."""
        x = F.relu(self.norm1(self.depthwise(torch.cat(tuple(parts.maps), dim=1))))
        x = F.relu(self.norm2(self.pointwise(x)))
        return HeadOutputs(self.classifier(x.mean((2, 3))))


class FeatureFusion(Objective):
    """L = sum_j CE(z_j) + CE(z_f) + w(e) T^2 [sum_j KL(p_f || p_j) + KL(p_mean || p_f)], targets detached.

    z_f are the fused logits, p_mean is of the mean of the branches' logits; all see one view.
    """

    num_views = 1
    has_ensemble = True
    uses_mean_teacher = False
    deployment = Deployment("student", peer=0)
    headline = {"FFL-S": "peer1", "FFL": "ensemble"}  # noqa: RUF012
    make_head = Fusion

    def __init__(self, options: FflConfig) -> None:
        self.options = options
        self.num_peers = options.num_peers
        self.head_weight_decay = options.fusion_weight_decay
        peers = self.num_peers
        self.term_names = (*of_each("ce", peers), "ce/ensemble", *of_each("kd", peers), "kd/ensemble")

    def terms(
        self, student: PeerOutputs, teacher: PeerOutputs | None, labels_B: Tensor, weight: float | Tensor
    ) -> Tensor:
        """Cross-entropies of branches and fusion, then what each learns from the other: [2 (m + 1)]."""
        assert student.ensemble_logits_BC is not None, "FFL needs its fusion"
        fused_BC = full_precision(student.ensemble_logits_BC)
        logits_VBC = full_precision(student.logits_VBC)
        temperature = self.options.temperature
        taught_V = ensemble_distillation(fused_BC.detach(), logits_VBC, temperature)
        back_1 = ensemble_distillation(logits_VBC.mean(0).detach(), fused_BC[None], temperature)
        hard = [peer_cross_entropies(logits_VBC, labels_B), F.cross_entropy(fused_BC, labels_B)[None]]
        return torch.cat([*hard, weight * taught_V, weight * back_1])
