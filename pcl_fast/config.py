"""Everything a run can be told, validated at once.

Each field is a flag of `pcl-fast train`: `Config.optim.lr` is `--optim.lr`. What is wrong is said with
the flag, the value and the fix. Fields whose value in the paper is inferred or unknown say so.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pcl_fast.errors import ConfigError

DatasetName = Literal["cifar10", "cifar100", "imagenet"]
Backend = Literal["resident", "ffcv", "dali", "torch", "synthetic"]
NUM_CLASSES: dict[DatasetName, int] = {"cifar10": 10, "cifar100": 100, "imagenet": 1000}
TRAIN_IMAGES: dict[DatasetName, int] = {"cifar10": 50_000, "cifar100": 50_000, "imagenet": 1_281_167}
TEST_IMAGES: dict[DatasetName, int] = {"cifar10": 10_000, "cifar100": 10_000, "imagenet": 50_000}
IMAGE_SIZES: dict[DatasetName, int] = {"cifar10": 32, "cifar100": 32, "imagenet": 224}
MAX_PEERS = 8


def _require(condition: bool, flag: str, value: object, fix: str) -> None:
    if not condition:
        raise ConfigError(f"--{flag} {value}: {fix}")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is trained on."""

    dataset: DatasetName = "cifar10"
    """The data set; its augmentation, normalisation and number of classes follow from it."""
    root: Path | None = None
    """Folder of the fetched CIFAR data sets; by default the one `pcl-fast fetch` writes to."""
    train: Path | None = None
    """ImageNet's training images: a .beton file, or a folder with a subfolder for each class."""
    val: Path | None = None
    """ImageNet's validation images, likewise."""
    num_classes: int | None = None
    """Classes of the data set; by default as many as it has."""
    fingerprint: str | None = None
    """Of the .beton file to train on; by default its own, which a run that goes on insists on."""
    backend: Backend = "resident"
    """ffcv, dali, torch: images are decoded by that library. resident: the data set (CIFAR) lies in device
    memory and is augmented there. synthetic: random images."""
    workers: int | None = None
    """Threads or processes that decode; by default one for each core that this process may use."""
    decode: Literal["auto", "cpu", "gpu"] = "auto"
    """Where dali decodes; auto is where the run's device is."""
    crops: Literal["ours", "library"] = "ours"
    """Who resizes the crops that dali decodes: our kernels, or dali."""
    image_size: int | None = None
    """Height and width of the views; by default the data set's (ImageNet: 224)."""
    order: Literal["shuffled", "pages"] = "shuffled"
    """shuffled: uniformly. pages: window by window, which reads a .beton larger than memory once an epoch."""
    window_pages: int = 256
    """Pages of a .beton (8 MiB each, unless converted otherwise) that are shuffled together: half of what
    memory must hold."""
    subset: int | None = None
    """Train on the first SUBSET images only."""
    drop_last: bool = True
    """Leave out the incomplete last batch of an epoch (its samples differ from epoch to epoch)."""

    def __post_init__(self) -> None:
        """Validate."""
        _require(self.subset is None or self.subset > 0, "data.subset", self.subset, "give at least 1 image")
        for name in ("num_classes", "image_size", "workers", "window_pages"):
            value, least = getattr(self, name), 0 if name == "workers" else 1
            flag = f"data.{name.replace('_', '-')}"
            _require(value is None or value >= least, flag, value, f"give at least {least}")

    @property
    def classes(self) -> int:
        """The number of classes, given or the data set's."""
        return self.num_classes or NUM_CLASSES[self.dataset]

    @property
    def pixels(self) -> int:
        """Height and width of the views, given or the data set's."""
        return self.image_size or IMAGE_SIZES[self.dataset]


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

    def __post_init__(self) -> None:
        """Validate."""
        peers = self.num_peers
        _require(1 <= peers <= MAX_PEERS, "pcl.num-peers", peers, f"give 1 to {MAX_PEERS}")
        _require(self.temperature > 0, "pcl.temperature", self.temperature, "give a positive number, as 3")
        _require(self.distill_weight >= 0, "pcl.distill-weight", self.distill_weight, "give 0 or more")
        alpha = self.rampup_epochs
        _require(alpha is None or alpha >= 0, "pcl.rampup-epochs", alpha, "give 0 (no ramp-up) or more")
        _require(0 <= self.rampup_share <= 1, "pcl.rampup-share", self.rampup_share, "give a share, 0 to 1")
        _require(0 <= self.ema_decay < 1, "pcl.ema-decay", self.ema_decay, "give 0 or more, below 1")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """SGD and its schedule."""

    lr: float = 0.1
    """Learning rate at the start."""
    momentum: float = 0.9
    """Momentum."""
    nesterov: bool = True
    """Nesterov's momentum."""
    weight_decay: float = 5e-4
    """Weight decay, on every parameter."""
    milestones: tuple[float, ...] = (150 / 300, 225 / 300)
    """Shares of the run after which the learning rate is multiplied by GAMMA."""
    gamma: float = 0.1
    """The factor at each milestone."""

    def __post_init__(self) -> None:
        """Validate."""
        _require(self.lr > 0, "optim.lr", self.lr, "give a positive number, as 0.1")
        _require(0 <= self.momentum < 1, "optim.momentum", self.momentum, "give 0 or more, below 1")
        _require(self.weight_decay >= 0, "optim.weight-decay", self.weight_decay, "give 0 or more")
        _require(self.gamma > 0, "optim.gamma", self.gamma, "give a positive number, as 0.1")
        shares = self.milestones
        fix = "give rising shares of the run: epoch 150 of 300 is 0.5"
        _require(
            all(0 < s < 1 for s in shares) and sorted(shares) == list(shares), "optim.milestones", shares, fix
        )
        _require(
            not self.nesterov or self.momentum > 0, "optim.nesterov", True, "needs --optim.momentum above 0"
        )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long, how much at once, how often to look."""

    epochs: int = 300
    """Passes over the training images."""
    batch_size: int = 128
    """Images a step, on each device; each becomes one view per peer."""
    eval_batch_size: int = 500
    """Images a batch in evaluation."""
    eval_every: int = 1
    """Evaluate after every EVAL_EVERY epochs, and after the last."""
    save_every: int = 1
    """Save a checkpoint after every SAVE_EVERY epochs, and after the last."""
    save_seconds: float = 20.0
    """But not so soon after the last one: with epochs of a second, writing would take a tenth of the time."""
    log_every: int = 50
    """Write the mean of every term to metrics.jsonl each LOG_EVERY steps."""

    def __post_init__(self) -> None:
        """Validate."""
        for spec in dataclasses.fields(self):
            value, least = getattr(self, spec.name), 0 if spec.name == "save_seconds" else 1
            _require(value >= least, f"train.{spec.name.replace('_', '-')}", value, f"give at least {least}")


@dataclass(frozen=True, kw_only=True)
class AmpConfig:
    """Mixed precision."""

    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Precision of convolutions and their activations; weights, losses and the EMA are always float32."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """One run."""

    method: Literal["pcl", "vanilla"] = "pcl"
    """pcl: Peer Collaborative Learning. vanilla: the same network trained alone."""
    model: str = "resnet32"
    """A backbone of ours, `torchvision:NAME` or `timm:NAME`."""
    split: str | None = None
    """The module at which branches begin, as `layer3`; needed for networks that are not ours."""
    data: DataConfig = field(default_factory=DataConfig)
    pcl: PclConfig = field(default_factory=PclConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    amp: AmpConfig = field(default_factory=AmpConfig)
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
        for flag, seeds in (("seed", (self.seed,)), ("seeds", self.seeds)):
            for seed in seeds:
                _require(0 <= seed < 2**32, flag, seed, "give 0 to 4294967295")
        listed = ",".join(map(str, self.seeds))
        _require(len(set(self.seeds)) == len(self.seeds), "seeds", listed, "give each seed once")
