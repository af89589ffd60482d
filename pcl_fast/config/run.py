"""One run, with everything it can be told."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pcl_fast.config.data import DataConfig
from pcl_fast.config.pcl import PclConfig
from pcl_fast.config.require import require
from pcl_fast.config.rivals import (
    ClConfig,
    DmlConfig,
    FflConfig,
    KdclConfig,
    KdConfig,
    OkddipConfig,
    OneConfig,
)
from pcl_fast.config.training import AmpConfig, DistConfig, OptimConfig, TrainConfig


@dataclass(frozen=True, kw_only=True)
class Config:
    """One run."""

    method: str = "pcl"
    """pcl: Peer Collaborative Learning; its rivals kd (in two stages), dml, cl, one, okddip, ffl and kdcl;
    vanilla: the network trained alone."""
    model: str = "resnet32"
    """A backbone of ours, `torchvision:NAME` or `timm:NAME`; or one for each peer, as `resnet8,resnet20`."""
    split: str | None = None
    """The module at which branches begin, as `layer3`, or `none` for peers that share nothing; needed for
    networks that are not ours."""
    init: Path | None = None
    """Begin with the network that another run has left: its folder, or its model.safetensors. Classifiers of
    other classes, and peers of other backbones, begin at random."""
    data: DataConfig = field(default_factory=DataConfig)
    pcl: PclConfig = field(default_factory=PclConfig)
    kd: KdConfig = field(default_factory=KdConfig)
    dml: DmlConfig = field(default_factory=DmlConfig)
    cl: ClConfig = field(default_factory=ClConfig)
    one: OneConfig = field(default_factory=OneConfig)
    okddip: OkddipConfig = field(default_factory=OkddipConfig)
    ffl: FflConfig = field(default_factory=FflConfig)
    kdcl: KdclConfig = field(default_factory=KdclConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    amp: AmpConfig = field(default_factory=AmpConfig)
    dist: DistConfig = field(default_factory=DistConfig)
    ranks: int | None = None
    """Processes that train it together; by default as many as torchrun has started."""
    sync_bn: bool = False
    """BatchNorm's statistics over the batches of all ranks, not of each alone."""
    channels_last: Literal["auto", "on", "off"] = "auto"
    """Memory layout of images and weights; auto follows the precision on the CPU, and is on elsewhere."""
    compile: bool = False
    """Compile the network with torch.compile (the first step then takes minutes on a CPU)."""
    capture: Literal["auto", "on", "off"] = "auto"
    """Run each step as one CUDA graph; auto does on a GPU. Where it cannot be, the reason is said."""
    kernels: Literal["auto", "off"] = "auto"
    """Our own kernels, where they fit and can be built; or torch's alone."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    deterministic: bool = False
    """Use deterministic kernels only (the CPU's always are)."""
    seed: int = 0
    """Seed of weights, order and augmentation."""
    seeds: tuple[int, ...] = ()
    """Train a run for each of these seeds, as 0,1,2, side by side in one process; in the place of SEED."""
    run_dir: Path | None = None
    """Run folder; by default runs/PRESET-METHOD-seedN. Running the same command again resumes."""
    resume: bool = True
    """Go on from the newest checkpoint in the run folder; otherwise refuse a folder that has one."""

    def __post_init__(self) -> None:
        """Validate."""
        require(self.ranks is None or self.ranks >= 1, "ranks", self.ranks, "give at least 1")
        for flag, seeds in (("seed", (self.seed,)), ("seeds", self.seeds)):
            for seed in seeds:
                require(0 <= seed < 2**32, flag, seed, "give 0 to 4294967295")
        listed = ",".join(map(str, self.seeds))
        require(len(set(self.seeds)) == len(self.seeds), "seeds", listed, "give each seed once")

    @property
    def global_batch(self) -> int:
        """Images a step, on all ranks together."""
        return self.train.batch_size * (self.ranks or 1)

    @property
    def initial_lr(self) -> float:
        """The learning rate at the start, scaled to the global batch where that is wanted."""
        if self.optim.lr_batch is None:
            return self.optim.lr
        return self.optim.lr * self.global_batch / self.optim.lr_batch
