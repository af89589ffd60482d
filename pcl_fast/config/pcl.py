"""The options of the method."""

from dataclasses import dataclass
from typing import Literal

from pcl_fast.config.require import require

MAX_PEERS = 8


@dataclass(frozen=True, kw_only=True)
class PclConfig:
    """The options of Peer Collaborative Learning."""

    num_peers: int = 3
    """m, the number of peers."""
    temperature: float = 3.0
    """T, which softens teachers' and peers' predictions (PCL eqs. 3, 5)."""
    distill_weight: float = 1.0
    """lambda, the weight of both distillation losses after the ramp-up (inferred from the lineage)."""
    rampup_epochs: float | None = None
    """alpha, epochs over which the weight rises (inferred: 80 of 300); by default RAMPUP_SHARE of them."""
    rampup_share: float = 80 / 300
    """alpha as a share of the epochs, used unless --pcl.rampup-epochs is given."""
    ema_decay: float = 0.999
    """The most that phi, the EMA coefficient of the mean teachers, rises to."""
    ema_bn: Literal["own", "copy", "ema"] = "own"
    """BatchNorm statistics of the mean teachers. own: parameters only are averaged, and the teachers
    run in train mode, with running statistics of their own. copy, ema: the students' running statistics
    are copied or averaged, and the teachers run in eval mode."""
    bn_views: Literal["per_view", "joint"] = "per_view"
    """The trunk's BatchNorm sees one view at a time, or all views of a batch at once."""
    trunk_views: Literal["batched", "loop"] = "batched"
    """How the trunk runs the views: as one batch, or view by view. The results are the same."""
    view_per_peer: bool = True
    """Augment every sample once per peer; otherwise all peers share one view (the paper's ablation)."""
    detach_ensemble: bool = True
    """Keep the distillation loss from moving the ensemble teacher (inferred)."""
    ensemble_teacher: bool = True
    """Distil from the peer ensemble teacher (L_pe; the paper's ablation turns it off)."""
    mean_teacher: bool = True
    """Distil from the peer mean teachers (L_pm; the paper's ablation turns it off)."""
    mutual_learning: bool = False
    """Let peers teach each other as they are, in the place of their mean teachers (plain mutual learning)."""

    def __post_init__(self) -> None:
        """Validate."""
        peers = self.num_peers
        require(1 <= peers <= MAX_PEERS, "pcl.num-peers", peers, f"give 1 to {MAX_PEERS}")
        require(self.temperature > 0, "pcl.temperature", self.temperature, "give a positive number, as 3")
        require(self.distill_weight >= 0, "pcl.distill-weight", self.distill_weight, "give 0 or more")
        plain = self.mutual_learning
        require(
            self.mean_teacher or not plain, "pcl.mutual-learning", plain, "leave out --pcl.no-mean-teacher"
        )
        alpha = self.rampup_epochs
        require(alpha is None or alpha >= 0, "pcl.rampup-epochs", alpha, "give 0 (no ramp-up) or more")
        require(0 <= self.rampup_share <= 1, "pcl.rampup-share", self.rampup_share, "give a share, 0 to 1")
        require(0 <= self.ema_decay < 1, "pcl.ema-decay", self.ema_decay, "give 0 or more, below 1")
