"""What every loader of encoded images is told, whichever library decodes them.

A loader is made as `Loader(path, options)`: `path` is a .beton file or, where the loader can read one,
a folder with a subfolder of images for each class.
"""

import dataclasses
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pcl_fast.errors import ConfigError
from pipelines.colours import ColourRule
from pipelines.normalisation import Normalisation

Order = Literal["shuffled", "pages"]
Decode = Literal["auto", "cpu", "gpu"]
Crops = Literal["ours", "library"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageOptions:
    """What training and evaluation have in common.

    `batch_size` is each rank's. `dtype`, `channels_last` and `device` are those of the images handed
    out: `image_size` x `image_size` pixels, normalised.
    """

    batch_size: int
    num_classes: int
    normalisation: Normalisation
    device: torch.device
    channels_last: bool
    dtype: torch.dtype = torch.float32
    image_size: int = 224
    workers: int = 0
    """Threads or processes that decode; 0 decodes in the caller's, where the loader can."""
    decode: Decode = "auto"
    """Where JPEGs are decoded, for loaders that have the choice."""
    crops: Crops = "ours"
    """Who resizes the crops, for loaders that have the choice: our kernels, or the library that decodes."""
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        for name in ("batch_size", "num_classes", "image_size", "world_size"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        _require(self.workers >= 0, "workers", self.workers, "0 or more")
        _require(0 <= self.rank < self.world_size, "rank", self.rank, f"0 to {self.world_size - 1}")
        known = (torch.float32, torch.bfloat16)
        _require(self.dtype in known, "dtype", self.dtype, "torch.float32 or torch.bfloat16")


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageEvalOptions(ImageOptions):
    """How images are served un-augmented: the shorter side becomes `resize`, then the centre is cropped.

    Every sample goes to exactly one of the `world_size` ranks.
    """

    resize: int = 256
    ids: tuple[int, ...] | None = None
    """Only these samples, in this order."""

    def __post_init__(self) -> None:
        ImageOptions.__post_init__(self)  # super() does not work in a dataclass with slots
        _require(self.resize >= self.image_size, "resize", self.resize, f"at least {self.image_size}")

    def chosen(self, available: int) -> Tensor:
        """The samples to serve, of so many: int64, those of all ranks."""
        return torch.arange(available) if self.ids is None else torch.tensor(self.ids, dtype=torch.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageTrainOptions(ImageOptions):
    """How images are served for training: `num_views` random resized crops of each, flipped or not.

    Every view is drawn from (`seed`, epoch, sample, view) alone, and the order from (`seed`, epoch); a
    global batch is `batch_size * world_size` samples, of which each rank has its part.
    """

    num_views: int
    seed: int
    drop_last: bool = True
    order: Order = "shuffled"
    window_pages: int = 256
    """Pages of a file that are shuffled together when `order` is "pages"."""
    subset: int | None = None
    """Only the first so many samples."""
    hold_out: int = 0
    """So many of them, drawn by the seed, are never served."""
    scale: tuple[float, float] = (0.08, 1.0)
    """Least and greatest share of the image's area that a crop covers."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Least and greatest width of a crop over its height."""
    epoch_sizes: tuple[int, ...] = ()
    """Height and width of the views of the first epochs, in the place of `image_size`."""
    colours: ColourRule | None = None
    """How colours are jittered."""

    def __post_init__(self) -> None:
        ImageOptions.__post_init__(self)
        _require(self.num_views >= 1, "number of views", self.num_views, "at least 1")
        _require(0 <= self.seed < 1 << 32, "seed", self.seed, f"from 0 to {(1 << 32) - 1}")
        _require(self.window_pages >= 1, "window of pages", self.window_pages, "at least 1")
        _require(self.subset is None or self.subset >= 1, "subset", self.subset, "at least 1")
        _require(self.hold_out >= 0, "samples held out", self.hold_out, "0 or more")
        _require(0 < self.scale[0] <= self.scale[1] <= 1, "scale", self.scale, "rising shares, 0 to 1")
        _require(0 < self.ratio[0] <= self.ratio[1], "ratio", self.ratio, "rising and positive")
        least = min(self.epoch_sizes, default=1)
        _require(least >= 1, "least size of an epoch", least, "at least 1")

    def in_epoch(self, epoch: int) -> "ImageTrainOptions":
        """The same with the size of an epoch (0-based), and of no other."""
        size = self.epoch_sizes[epoch] if epoch < len(self.epoch_sizes) else self.image_size
        return dataclasses.replace(self, image_size=size, epoch_sizes=())


def _require(condition: bool, name: str, value: object, needed: str) -> None:
    if not condition:
        raise ConfigError(f"the {name.replace('_', ' ')} of a loader is {value}: it must be {needed}")
