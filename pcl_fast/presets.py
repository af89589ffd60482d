"""One function a row of the paper; ImageNet on a node; two comparisons that need no GPU: `demo`, `gain`.

A preset is named like its function, with dashes: `cifar100_resnet32` is `pcl-fast train cifar100-resnet32`.
Every row has a twin `NAME-vanilla`, the same network trained alone with the same recipe. The paper's
figures are top-1 accuracy in percent, mean and standard deviation as printed; baselines in brackets were
not read in the paper itself.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from pcl_fast.config import TRAIN_IMAGES, Config, DataConfig, DatasetName, OptimConfig, PclConfig, TrainConfig
from pcl_fast.errors import ConfigError, did_you_mean

Method = Literal["pcl", "vanilla"]

# The mean teachers of 300 CIFAR epochs of 390 steps forget over 1 / (1 - 0.999) = 1,000 steps: this share.
EMA_HORIZON_SHARE = 1000 / (300 * 390)


@dataclass(frozen=True, slots=True)
class Preset:
    """What `pcl-fast train NAME` trains: `config` with each method and each seed, in this order."""

    name: str
    about: str
    config: Config
    methods: tuple[Method, ...]
    num_seeds: int = 1
    note: str = ""

    @property
    def is_comparison(self) -> bool:
        """Whether it is more than one run, whatever the flags."""
        return len(self.methods) * self.num_seeds > 1

    def runs(self, config: Config) -> list[Config]:
        """The runs, with `config` (this preset's, or as changed by flags) as their common settings."""
        seeds = config.seeds or range(config.seed, config.seed + self.num_seeds)
        methods = self.methods if len(self.methods) > 1 else (config.method,)
        return [
            dataclasses.replace(config, method=method, seed=seed, seeds=())
            for seed in seeds
            for method in methods
        ]


@dataclass(frozen=True, slots=True)
class _Row:
    build: Callable[[], Config]
    methods: tuple[Method, ...]
    num_seeds: int = 1
    note: str = ""


_ROWS: dict[str, _Row] = {}


def preset_names() -> list[str]:
    """All presets, in the order of this file."""
    return list(_ROWS)


def find_preset(name: str) -> Preset:
    """The preset of that name; ConfigError naming the nearest one if there is none."""
    if name not in _ROWS:
        hint = did_you_mean(name, _ROWS) or f" There are: {', '.join(_ROWS)}."
        raise ConfigError(f"unknown preset '{name}'.{hint}")
    row = _ROWS[name]
    config = row.build()
    if len(row.methods) == 1:
        config = dataclasses.replace(config, method=row.methods[0])
    return Preset(name, row.build.__doc__ or "", config, row.methods, row.num_seeds, row.note)


def _with_twin(build: Callable[[], Config]) -> Callable[[], Config]:
    name = build.__name__.replace("_", "-")
    _ROWS[name] = _Row(build, ("pcl",))
    _ROWS[f"{name}-vanilla"] = _Row(build, ("vanilla",))
    return build


def _comparison(num_seeds: int, note: str = "") -> Callable[[Callable[[], Config]], Callable[[], Config]]:
    def register(build: Callable[[], Config]) -> Callable[[], Config]:
        _ROWS[build.__name__] = _Row(build, ("vanilla", "pcl"), num_seeds, note)
        return build

    return register


def _cifar(dataset: DatasetName, model: str) -> Config:
    """The lineage's CIFAR recipe: 300 epochs, batch 128, lr 0.1, x0.1 at 150 and 225 (inferred)."""
    return Config(
        model=model,
        data=DataConfig(dataset=dataset),
        pcl=PclConfig(rampup_share=80 / 300),
        optim=OptimConfig(lr=0.1, weight_decay=5e-4, milestones=(150 / 300, 225 / 300)),
        train=TrainConfig(epochs=300, batch_size=128),
    )


def _imagenet(model: str, batch: int = 256, warmup: float = 0.0) -> Config:
    """The usual ImageNet recipe (the paper's own is unknown): 90 epochs, x0.1 at 30 and 60.

    `batch` images on each GPU; the learning rate is 0.1 for 256 images a step on all of them together.
    """
    return Config(
        model=model,
        data=DataConfig(dataset="imagenet", backend="ffcv"),
        pcl=PclConfig(rampup_share=20 / 90),
        optim=OptimConfig(
            lr=0.1, lr_batch=256, warmup_epochs=warmup, weight_decay=1e-4, milestones=(30 / 90, 60 / 90)
        ),
        train=TrainConfig(epochs=90, batch_size=batch),
    )


def shortened(config: Config, epochs: int, images: int | None = None) -> Config:
    """A recipe in few epochs (of few images): milestones, ramp-up and EMA keep their share of the run."""
    available = images or TRAIN_IMAGES[config.data.dataset]
    steps = epochs * (available // config.train.batch_size)
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, subset=images),
        pcl=dataclasses.replace(config.pcl, ema_decay=round(1 - 1 / (EMA_HORIZON_SHARE * steps), 4)),
        train=dataclasses.replace(config.train, epochs=epochs, log_every=10),
    )


@_comparison(
    num_seeds=1, note="Two runs of this length that differ in the seed alone differ by about one point."
)
def demo() -> Config:
    """ResNet-8 on 10,000 images of CIFAR-10, alone and with PCL: about 5 minutes on two cores.

    On a GPU: ResNet-32 on all 50,000, for 30 epochs. Too short for PCL to show its gain for sure.
    """
    if torch.cuda.is_available():
        return shortened(_cifar("cifar10", "resnet32"), epochs=30, images=50_000)
    config = shortened(_cifar("cifar10", "resnet8"), epochs=10, images=10_000)
    return dataclasses.replace(config, train=dataclasses.replace(config.train, eval_every=2, save_every=2))


@_comparison(num_seeds=3)
def gain() -> Config:
    """ResNet-8 on 5,000 images of CIFAR-10, three seeds alone, three with PCL: under an hour on two cores.

    So few images that in 80 epochs the network learns most of them by heart, as it does in the paper's 300
    epochs on 50,000: where it has not, there is little for a teacher to add.
    """
    config = shortened(_cifar("cifar10", "resnet8"), epochs=80, images=5_000)
    return dataclasses.replace(config, train=dataclasses.replace(config.train, eval_every=8, save_every=8))


@_with_twin
def cifar10_resnet32() -> Config:
    """ResNet-32 on CIFAR-10: PCL 94.33 +- 0.12, alone (93.62)."""
    return _cifar("cifar10", "resnet32")


@_with_twin
def cifar10_resnet110() -> Config:
    """ResNet-110 (bottleneck) on CIFAR-10: PCL 95.53 +- 0.16, alone 94.91."""
    return _cifar("cifar10", "resnet110")


@_with_twin
def cifar10_vgg16() -> Config:
    """VGG-16 on CIFAR-10: PCL 94.74 +- 0.02, alone 93.96."""
    return _cifar("cifar10", "vgg16")


@_with_twin
def cifar10_densenet40_12() -> Config:
    """DenseNet-40-12 on CIFAR-10: PCL 94.13 +- 0.13, alone 93.19."""
    return _cifar("cifar10", "densenet40_12")


@_with_twin
def cifar10_wrn20_8() -> Config:
    """WRN-20-8 on CIFAR-10: PCL 95.42 +- 0.04, alone (94.68)."""
    return _cifar("cifar10", "wrn20_8")


@_with_twin
def cifar100_resnet32() -> Config:
    """ResNet-32 on CIFAR-100: PCL 74.14 +- 0.16, alone (71.28)."""
    return _cifar("cifar100", "resnet32")


@_with_twin
def cifar100_resnet110() -> Config:
    """ResNet-110 (bottleneck) on CIFAR-100: PCL 79.98 +- 0.55, alone 76.21."""
    return _cifar("cifar100", "resnet110")


@_with_twin
def cifar100_vgg16() -> Config:
    """VGG-16 on CIFAR-100: PCL 76.89 +- 0.25, alone (74.32)."""
    return _cifar("cifar100", "vgg16")


@_with_twin
def cifar100_densenet40_12() -> Config:
    """DenseNet-40-12 on CIFAR-100: PCL 73.09 +- 0.16, alone 71.03."""
    return _cifar("cifar100", "densenet40_12")


@_with_twin
def cifar100_wrn20_8() -> Config:
    """WRN-20-8 on CIFAR-100: PCL 80.51 +- 0.49, alone (78.03)."""
    return _cifar("cifar100", "wrn20_8")


@_with_twin
def imagenet_r18() -> Config:
    """ResNet-18 on ImageNet: PCL 29.58 % top-1 error, alone (30.49); the usual recipe, its own is unknown."""
    return _imagenet("resnet18")


@_with_twin
def imagenet_r50() -> Config:
    """ResNet-50 on ImageNet, by the recipe of imagenet-r18."""
    return _imagenet("resnet50")


@_with_twin
def imagenet_rx50() -> Config:
    """ResNeXt-50 (32x4d) on ImageNet, by the recipe of imagenet-r18."""
    return _imagenet("resnext50")


@_with_twin
def imagenet_r18_node() -> Config:
    """ResNet-18 on ImageNet, on 8 GPUs: 128 images a GPU, 5 epochs of warm-up; no row of the paper.

    Learning rate 0.1 for 256 images, so 0.4. `--data.resize-from 160` switches progressive resizing on.
    """
    return _imagenet("resnet18", batch=128, warmup=5.0)


@_with_twin
def imagenet_r50_node() -> Config:
    """ResNet-50 on ImageNet, on 8 GPUs: otherwise as imagenet-r18-node."""
    return _imagenet("resnet50", batch=128, warmup=5.0)
