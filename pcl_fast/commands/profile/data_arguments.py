"""What `pcl-fast profile data` is asked."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

from pcl_fast.errors import ConfigError, did_you_mean
from pcl_fast.profile.usage import cores_available

LOADERS = {
    "ffcv": ("pipelines.ffcv_loader", "FfcvTrainLoader"),
    "dali": ("pipelines.dali_loader", "DaliTrainLoader"),
    "torch": ("pipelines.torch_loader", "TorchTrainLoader"),
}
STOCK = "stock-ffcv"
HOST = "ffcv-host"
KNOWN = (*LOADERS, HOST, STOCK)


@dataclass(frozen=True, kw_only=True)
class DataArguments:
    """Measure how many images a second loaders decode and augment, in turn, on the same images."""

    file: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FILE")]
    """A .beton file, or (dali and torch) a folder with a subfolder of images for each class"""
    backends: str = "ffcv,dali,torch"
    """Which, with commas between: ffcv, dali, torch; ffcv-host (what is left to the host when a GPU makes
    the views); stock-ffcv (FFCV as it comes: it decodes once a view)"""
    views: str = "1,2,3,4"
    """Numbers of views, with commas between"""
    workers: int = 0
    """Threads or processes of each; 0: one for each core"""
    batches: int = 24
    """Batches that are timed in each run; fewer where the images do not suffice"""
    repeats: int = 3
    """Runs of each"""
    image_size: int = 224
    """Side of the views, in pixels"""
    device: str = "cpu"
    """Where the views are wanted: cpu or cuda"""
    json: Path | None = None
    """Write everything measured to this file, too"""

    def check(self) -> None:
        """Raise ConfigError for what cannot be asked."""
        for name, least in (("workers", 0), ("batches", 1), ("repeats", 1), ("image_size", 1)):
            if getattr(self, name) < least:
                flag = name.replace("_", "-")
                raise ConfigError(f"--{flag} {getattr(self, name)}: give at least {least}")
        for name in self.backend_names:
            if name not in KNOWN:
                hint = did_you_mean(name, KNOWN) or f" There are: {', '.join(KNOWN)}."
                raise ConfigError(f"--backends {name}: no such loader.{hint}")
        if not all(word.isdecimal() and int(word) >= 1 for word in self.views.split(",")):
            raise ConfigError(f"--views {self.views}: give numbers from 1 on with commas between, as 1,2,3")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("--device cuda: torch finds no CUDA device here")
        if self.device not in ("cpu", "cuda"):
            raise ConfigError(f"--device {self.device}: give cpu or cuda")

    @property
    def backend_names(self) -> list[str]:
        """Each once, in the order given."""
        return list(dict.fromkeys(self.backends.split(",")))

    @property
    def view_counts(self) -> list[int]:
        """Each once, rising."""
        return sorted({int(word) for word in self.views.split(",")})

    @property
    def threads(self) -> int:
        """Of each loader."""
        return self.workers or cores_available()
