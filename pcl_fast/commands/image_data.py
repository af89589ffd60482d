"""Opening ImageNet, or images like it: one of three libraries decodes, and only that one must be there."""

import dataclasses
import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pcl_fast.config import Backend, Config
from pcl_fast.contract import EvalLoader, OpenData, TrainLoader
from pcl_fast.errors import ConfigError, DataError
from pcl_fast.schedules import view_size
from pipelines.colours import ColourRule
from pipelines.images import ClassList, list_classes, open_images
from pipelines.normalisation import NORMALISATIONS
from pipelines.options import ImageEvalOptions, ImageTrainOptions
from pipelines.order import held_out_ids

RESIZE_OVER_CROP = 256 / 224
HOW_TO_GIVE = (
    "give --data.train and --data.val: .beton files (`pcl-fast convert imagenet` makes them), or with "
    "--data.backend torch or dali folders with a subfolder for each class"
)


@dataclass(frozen=True, slots=True)
class _Library:
    """Where the loaders of a backend are, and the extra that installs what they import."""

    module: str
    prefix: str
    extra: str | None
    reads_folders: bool


_LIBRARIES: dict[Backend, _Library] = {
    "ffcv": _Library("pipelines.ffcv_loader", "Ffcv", "ffcv", False),
    "dali": _Library("pipelines.dali_loader", "Dali", "dali", True),
    "torch": _Library("pipelines.torch_loader", "Torch", None, True),
}


def fit_to_images(config: Config) -> Config:
    """The configuration with classes and fingerprint of the images it trains on, if it names any.

    Raises:
        ConfigError: for a backend that cannot read them.
        DataError: if they cannot be used, or training and validation images differ in their classes,
            or are not those whose number of classes or fingerprint was given.
    """
    data = config.data
    if data.backend not in _LIBRARIES:
        raise ConfigError(
            f"--data.backend {data.backend}: ImageNet is read by ffcv, dali or torch (or synthetic: noise)"
        )
    if data.train is None:
        return config
    found = list_classes(data.train)
    if data.num_classes not in (None, found.number):
        raise DataError(f"{data.train} has {found.number} classes, not --data.num-classes {data.num_classes}")
    if data.val is not None:
        _compare(data.train, found, data.val, list_classes(data.val))
    if data.fingerprint not in (None, found.fingerprint):
        raise DataError(
            f"{data.train} has the fingerprint {found.fingerprint}, not --data.fingerprint {data.fingerprint}"
        )
    known = dataclasses.replace(data, num_classes=found.number, fingerprint=found.fingerprint)
    return dataclasses.replace(config, data=known)


def count_train_images(config: Config) -> int | None:
    """The training images of a configuration that names them, else None."""
    given = config.data.train if config.data.backend in _LIBRARIES else None
    return None if given is None else len(open_images(given).labels_N)


def open_image_data(config: Config, num_views: int, rank: int) -> OpenData:
    """The loaders of the configured backend, for one of the configuration's ranks.

    Raises:
        ConfigError: if no images are given, the backend cannot read them, or is not installed.
        DataError: if they cannot be used.
    """
    train, val = _open_train(config, num_views, rank), open_val_images(config, rank)
    return OpenData(train, val, _open_held_out(config, rank) if config.data.hold_out else None)


def open_val_images(config: Config, rank: int) -> EvalLoader:
    """The evaluation loader of the configured backend; raises as `open_image_data` does."""
    return _open_eval(config, rank, _readable(config, config.data.val, "val"))


def _open_held_out(config: Config, rank: int) -> EvalLoader:
    """The training images that are held out, as in evaluation."""
    path = _readable(config, config.data.train, "train")
    available = config.data.subset or len(open_images(path).labels_N)
    ids: list[int] = held_out_ids(available, config.data.hold_out, config.seed).tolist()
    return _open_eval(config, rank, path, tuple(ids))


def _open_eval(config: Config, rank: int, path: Path, ids: tuple[int, ...] | None = None) -> EvalLoader:
    resize = round(config.data.pixels * RESIZE_OVER_CROP)
    common = _common(config, rank)
    options = ImageEvalOptions(batch_size=config.train.eval_batch_size, resize=resize, ids=ids, **common)
    return _loader(config.data.backend, "EvalLoader")(path, options)


def _open_train(config: Config, num_views: int, rank: int) -> TrainLoader:
    data = config.data
    options = ImageTrainOptions(
        batch_size=config.train.batch_size,
        num_views=num_views,
        seed=config.seed,
        drop_last=data.drop_last,
        order=data.order,
        window_pages=data.window_pages,
        subset=data.subset,
        hold_out=data.hold_out,
        epoch_sizes=epoch_sizes(config),
        colours=ColourRule.of(data.color_jitter),
        **_common(config, rank),
    )
    return _loader(data.backend, "TrainLoader")(_readable(config, data.train, "train"), options)


def _common(config: Config, rank: int) -> dict[str, Any]:
    """What both loaders are told."""
    data = config.data
    return {
        "num_classes": data.classes,
        "normalisation": NORMALISATIONS[data.dataset],
        "device": torch.device(config.device),
        "channels_last": config.channels_last == "on",
        # The first convolution would round float32 images to just these.
        "dtype": torch.bfloat16 if config.amp.dtype == "bfloat16" else torch.float32,
        "image_size": data.pixels,
        "workers": default_workers() if data.workers is None else data.workers,
        "decode": data.decode,
        "crops": data.crops,
        "rank": rank,
        "world_size": config.ranks or 1,
    }


def epoch_sizes(config: Config) -> tuple[int, ...]:
    """Height and width of the views of each epoch; empty where they are the same throughout."""
    data, epochs = config.data, config.train.epochs
    if data.resize_from is None:
        return ()
    rule = (data.resize_from, data.resize_until, data.pixels)
    return tuple(view_size(epoch, epochs, *rule) for epoch in range(epochs))


def default_workers() -> int:
    """One for each core of this process, which it shares with the other ranks that torchrun started here."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _readable(config: Config, path: Path | None, flag: str) -> Path:
    backend = config.data.backend
    if path is None:
        raise ConfigError(f"--data.{flag} is missing: {HOW_TO_GIVE}")
    if path.is_dir() and not _LIBRARIES[backend].reads_folders:
        raise ConfigError(
            f"--data.{flag} {path}: {backend} reads .beton files; make one of this folder with "
            "`pcl-fast convert imagefolder`, or give --data.backend torch or dali"
        )
    return path


def _loader(backend: Backend, kind: str) -> Callable[[Path, Any], Any]:
    """A loader's class, whose missing library is a ConfigError that says how to install it."""
    library = _LIBRARIES[backend]

    def make(path: Path, options: Any) -> Any:
        try:
            module = importlib.import_module(library.module)
            return getattr(module, library.prefix + kind)(path, options)
        except ImportError as error:
            raise ConfigError(
                f"--data.backend {backend}: cannot be imported here ({error}); "
                f"pip install 'pcl-fast[{library.extra}]', or give another backend"
            ) from error

    return make


def _compare(train: Path, ours: ClassList, val: Path, theirs: ClassList) -> None:
    if ours.names is None or theirs.names is None:
        if theirs.number > ours.number:
            raise DataError(f"{val} has labels of {theirs.number} classes, {train} of {ours.number}")
    elif ours.names != theirs.names:
        odd = sorted(set(ours.names) ^ set(theirs.names))[:3]
        raise DataError(
            f"{train} has {ours.number} classes and {val} {theirs.number}, not the same ones "
            f"(as {', '.join(odd) or 'their order'}): labels would not mean the same"
        )
