"""What a run is trained on."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pcl_fast.config.require import require

DatasetName = Literal["cifar10", "cifar100", "imagenet"]
Backend = Literal["resident", "ffcv", "dali", "torch", "synthetic"]
NUM_CLASSES: dict[DatasetName, int] = {"cifar10": 10, "cifar100": 100, "imagenet": 1000}
TRAIN_IMAGES: dict[DatasetName, int] = {"cifar10": 50_000, "cifar100": 50_000, "imagenet": 1_281_167}
TEST_IMAGES: dict[DatasetName, int] = {"cifar10": 10_000, "cifar100": 10_000, "imagenet": 50_000}
IMAGE_SIZES: dict[DatasetName, int] = {"cifar10": 32, "cifar100": 32, "imagenet": 224}


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
    resize_from: int | None = None
    """Progressive resizing: the first epochs see views of this size, which rises to IMAGE_SIZE; a multiple
    of 32. Not what the paper did."""
    resize_until: float = 0.75
    """The share of the run at which views have reached IMAGE_SIZE."""
    order: Literal["shuffled", "pages"] = "shuffled"
    """shuffled: uniformly. pages: window by window, which reads a .beton larger than memory once an epoch."""
    window_pages: int = 256
    """Pages of a .beton (8 MiB each, unless converted otherwise) that are shuffled together: half of what
    memory must hold."""
    subset: int | None = None
    """Train on the first SUBSET images only."""
    hold_out: int = 0
    """Never train on HOLD_OUT of these images, drawn by the seed: --kdcl.target general weighs networks by
    them; with any method, the others are what such a run trains on."""
    drop_last: bool = True
    """Leave out the incomplete last batch of an epoch (its samples differ from epoch to epoch)."""
    cutout: int = 0
    """Set a square of CUTOUT x CUTOUT pixels of each view to the mean colour; 0: none. Not what the paper
    did."""
    color_jitter: float = 0.0
    """Change brightness, contrast and saturation of each view by up to this share, in random order; 0: not.
    Not what the paper did."""

    def __post_init__(self) -> None:
        """Validate."""
        require(self.subset is None or self.subset > 0, "data.subset", self.subset, "give at least 1 image")
        for name in ("num_classes", "image_size", "workers", "window_pages", "hold_out"):
            value, least = getattr(self, name), 0 if name in ("workers", "hold_out") else 1
            flag = f"data.{name.replace('_', '-')}"
            require(value is None or value >= least, flag, value, f"give at least {least}")
        start = self.resize_from
        fits = start is None or (start % 32 == 0 and 32 <= start <= self.pixels)
        require(fits, "data.resize-from", start, f"give a multiple of 32, at most {self.pixels}")
        jitter = self.color_jitter
        require(0 <= jitter <= 1, "data.color-jitter", jitter, "give a share, 0 (off) to 1")
        hole, most = self.cutout, self.pixels
        require(0 <= hole <= most, "data.cutout", hole, f"give 0 (off) to {most} pixels")
        require(0 < self.resize_until <= 1, "data.resize-until", self.resize_until, "give a share, up to 1")

    @property
    def classes(self) -> int:
        """The number of classes, given or the data set's."""
        return self.num_classes or NUM_CLASSES[self.dataset]

    @property
    def pixels(self) -> int:
        """Height and width of the views, given or the data set's."""
        return self.image_size or IMAGE_SIZES[self.dataset]
