"""The options of the methods that PCL is compared with."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pcl_fast.config.pcl import MAX_PEERS
from pcl_fast.config.require import require


def _require_peers(flag: str, peers: int) -> None:
    require(2 <= peers <= MAX_PEERS, flag, peers, f"give 2 to {MAX_PEERS}")


@dataclass(frozen=True, kw_only=True)
class KdConfig:
    """Two-stage distillation."""

    teacher: Path | None = None
    """The teacher: the folder of a finished run, or its model.safetensors. By default it is trained first."""
    teacher_model: str | None = None
    """The network of a teacher that is trained first; by default the student's."""
    temperature: float = 3.0
    """Which softens the teacher and what learns from it."""
    alpha: float = 1.0
    """The weight of what the teacher teaches."""

    def __post_init__(self) -> None:
        """Validate."""
        require(self.temperature > 0, "kd.temperature", self.temperature, "give a positive number, as 3")
        require(self.alpha >= 0, "kd.alpha", self.alpha, "give 0 or more")


@dataclass(frozen=True, kw_only=True)
class DmlConfig:
    """Deep mutual learning."""

    num_peers: int = 3
    """How many networks learn from each other; its authors had 2, PCL's comparison as many as peers."""
    temperature: float = 1.0
    """Which softens what they say to each other."""
    weight: float = 1.0
    """Of what they learn from each other."""
    separate: bool = True
    """Whole networks; otherwise branches of one that share its trunk."""

    def __post_init__(self) -> None:
        """Validate."""
        _require_peers("dml.num-peers", self.num_peers)
        require(self.temperature > 0, "dml.temperature", self.temperature, "give a positive number, as 1")
        require(self.weight >= 0, "dml.weight", self.weight, "give 0 or more")


@dataclass(frozen=True, kw_only=True)
class ClConfig:
    """Collaborative learning, with the representations below the split shared (CL-ILR)."""

    num_heads: int = 3
    """How many heads learn from each other."""
    beta: float = 0.5
    """The share of the labels; the rest is what the other heads say."""
    temperature: float = 2.0
    """Which softens what heads say to each other."""

    def __post_init__(self) -> None:
        """Validate."""
        _require_peers("cl.num-heads", self.num_heads)
        require(0 < self.beta <= 1, "cl.beta", self.beta, "give a share above 0, up to 1")
        require(self.temperature > 0, "cl.temperature", self.temperature, "give a positive number, as 2")


@dataclass(frozen=True, kw_only=True)
class BranchesConfig:
    """What ONE, OKDDip and FFL have in common. Their weight rises as PCL's does (--pcl.rampup-epochs)."""

    num_peers: int = 3
    """How many branches learn."""
    temperature: float = 3.0
    """Which softens teachers and what learns from them."""

    def __post_init__(self) -> None:
        """Validate."""
        method = type(self).__name__.removesuffix("Config").lower()
        _require_peers(f"{method}.num-peers", self.num_peers)
        softness = self.temperature
        require(softness > 0, f"{method}.temperature", softness, "give a positive number, as 3")


@dataclass(frozen=True, kw_only=True)
class OneConfig(BranchesConfig):
    """Knowledge distillation by on-the-fly native ensemble."""


@dataclass(frozen=True, kw_only=True)
class OkddipConfig(BranchesConfig):
    """Online knowledge distillation with diverse peers: NUM_PEERS of them, and a leader."""

    def __post_init__(self) -> None:
        """Validate."""
        most, peers = MAX_PEERS - 1, self.num_peers
        require(2 <= peers <= most, "okddip.num-peers", peers, f"give 2 to {most}, as the leader is one more")
        BranchesConfig.__post_init__(self)


@dataclass(frozen=True, kw_only=True)
class FflConfig(BranchesConfig):
    """Feature fusion for online mutual knowledge distillation."""

    fusion_weight_decay: float = 1e-5
    """Weight decay of the fusion module, in the place of --optim.weight-decay."""

    def __post_init__(self) -> None:
        """Validate."""
        BranchesConfig.__post_init__(self)
        decay = self.fusion_weight_decay
        require(decay >= 0, "ffl.fusion-weight-decay", decay, "give 0 or more")


@dataclass(frozen=True, kw_only=True)
class KdclConfig:
    """Knowledge distillation via collaborative learning."""

    num_peers: int = 3
    """How many networks learn, each from views of its own."""
    target: Literal["naive", "linear", "minlogit", "general"] = "minlogit"
    """What teaches all of them. naive: for each image the network with the lowest cross-entropy. linear: the
    convex combination of their logits with the lowest. minlogit: for each class the least logit, less the
    label's. general: one combination for all images, with the least squared error on the images of
    --data.hold-out, measured after every epoch."""
    temperature: float = 2.0
    """Which softens the target and what learns from it."""
    weight: float = 1.0
    """Of what the target teaches."""
    separate: bool = True
    """Whole networks; otherwise branches of one that share its trunk."""

    def __post_init__(self) -> None:
        """Validate."""
        _require_peers("kdcl.num-peers", self.num_peers)
        require(self.temperature > 0, "kdcl.temperature", self.temperature, "give a positive number, as 2")
        require(self.weight >= 0, "kdcl.weight", self.weight, "give 0 or more")
