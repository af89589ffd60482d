"""Opening the data set of a run: the one place where data sets, pipelines and trainer meet."""

import contextlib
import dataclasses
from collections.abc import Generator

import torch

from datasets_prep.cifar import CifarArrays, load_cifar
from pcl_fast.commands import image_data
from pcl_fast.config import NUM_CLASSES, TEST_IMAGES, TRAIN_IMAGES, Config
from pcl_fast.contract import EvalLoader, OpenData, TrainLoader, close_if_possible
from pcl_fast.errors import ConfigError
from pipelines.colours import ColourRule
from pipelines.cutout import with_cutout
from pipelines.normalisation import NORMALISATIONS
from pipelines.order import held_out_ids
from pipelines.resident import EvalOptions, ResidentEvalLoader, ResidentTrainLoader, TrainOptions
from pipelines.synthetic import SyntheticEvalLoader, SyntheticOptions, SyntheticTrainLoader


def fit_to_data(config: Config) -> Config:
    """The configuration with what only the data set can tell: its number of classes.

    Raises:
        ConfigError: for a backend, or classes, that the data set does not have.
        DataError: if the data set is given and cannot be used.
    """
    data = config.data
    if data.backend == "synthetic":
        if data.color_jitter:
            raise ConfigError(f"--data.color-jitter {data.color_jitter}: synthetic images have no colours")
        return config
    if data.dataset == "imagenet":
        return image_data.fit_to_images(config)
    if data.backend != "resident":
        raise ConfigError(f"--data.backend {data.backend}: {data.dataset} is trained with resident")
    if data.resize_from is not None:
        raise ConfigError(
            f"--data.resize-from {data.resize_from}: for images that are decoded, as ImageNet's"
        )
    for flag, given in (("train", data.train), ("val", data.val), ("image-size", data.image_size)):
        if given is not None:
            fix = "it is read from --data.root, in its own size"
            raise ConfigError(f"--data.{flag} {given}: not for {data.dataset}; {fix}")
    if data.classes != NUM_CLASSES[data.dataset]:
        has = f"{data.dataset} has {NUM_CLASSES[data.dataset]} classes"
        raise ConfigError(f"--data.num-classes {data.num_classes}: {has}")
    return config


@contextlib.contextmanager
def opened_data(config: Config, num_views: int, rank: int = 0) -> Generator[OpenData]:
    """The loaders of `open_data` within a block, which closes them."""
    data = open_data(config, num_views, rank)
    try:
        yield data
    finally:
        data.close()


def open_data(config: Config, num_views: int, rank: int = 0) -> OpenData:
    """The loaders of a resolved configuration, with `num_views` views of every training image.

    Of the configuration's ranks each opens its own: `rank` has its share of every batch.
    DataError if the data set is not there or not as it should be.
    """
    data = _open_plain(config, num_views, rank)
    train = with_cutout(data.train, config.data.cutout, config.seed, torch.device(config.device))
    return dataclasses.replace(data, train=train)


def _open_plain(config: Config, num_views: int, rank: int) -> OpenData:
    if config.data.backend == "synthetic":
        return _open_synthetic(config, num_views, rank)
    if config.data.dataset == "imagenet":
        return image_data.open_image_data(config, num_views, rank)
    arrays = load_cifar(config.data.dataset, config.data.root)
    train, val = _resident_train(config, num_views, arrays, rank), _resident_val(config, arrays, rank)
    return OpenData(train, val, _resident_held_out(config, arrays, rank) if config.data.hold_out else None)


@contextlib.contextmanager
def opened_val(config: Config) -> Generator[EvalLoader]:
    """The evaluation loader alone, of all images, however many ranks trained; training images may be gone."""
    val = _open_val(dataclasses.replace(config, ranks=1))
    try:
        yield val
    finally:
        close_if_possible(val)


def _open_val(config: Config) -> EvalLoader:
    if config.data.backend == "synthetic":
        return _synthetic_val(config, rank=0)
    if config.data.dataset == "imagenet":
        return image_data.open_val_images(config, rank=0)
    return _resident_val(config, load_cifar(config.data.dataset, config.data.root), rank=0)


def _resident_train(config: Config, num_views: int, arrays: CifarArrays, rank: int) -> TrainLoader:
    subset, available = config.data.subset, len(arrays.train_images)
    if subset is not None and subset > available:
        raise ConfigError(f"--data.subset {subset}: {config.data.dataset} has {available} training images")
    options = TrainOptions(
        batch_size=config.train.batch_size,
        num_classes=arrays.num_classes,
        normalisation=NORMALISATIONS[config.data.dataset],
        device=torch.device(config.device),
        channels_last=config.channels_last == "on",
        num_views=num_views,
        seed=config.seed,
        drop_last=config.data.drop_last,
        colours=ColourRule.of(config.data.color_jitter),
        hold_out=config.data.hold_out,
        dtype=torch.bfloat16 if config.amp.dtype == "bfloat16" else torch.float32,
        rank=rank,
        world_size=config.ranks or 1,
    )
    images, labels = map(torch.from_numpy, (arrays.train_images[:subset], arrays.train_labels[:subset]))
    return ResidentTrainLoader(images, labels, options)


def _resident_val(config: Config, arrays: CifarArrays, rank: int) -> EvalLoader:
    images, labels = map(torch.from_numpy, (arrays.test_images, arrays.test_labels))
    return ResidentEvalLoader(images, labels, _eval_options(config, arrays, rank))


def _resident_held_out(config: Config, arrays: CifarArrays, rank: int) -> EvalLoader:
    """The training images that are held out, as in evaluation."""
    available = config.data.subset or len(arrays.train_images)
    ids_N = held_out_ids(available, config.data.hold_out, config.seed)
    images, labels = map(torch.from_numpy, (arrays.train_images, arrays.train_labels))
    return ResidentEvalLoader(images[ids_N], labels[ids_N], _eval_options(config, arrays, rank))


def _eval_options(config: Config, arrays: CifarArrays, rank: int) -> EvalOptions:
    return EvalOptions(
        batch_size=config.train.eval_batch_size,
        num_classes=arrays.num_classes,
        normalisation=NORMALISATIONS[config.data.dataset],
        device=torch.device(config.device),
        channels_last=config.channels_last == "on",
        rank=rank,
        world_size=config.ranks or 1,
    )


def _open_synthetic(config: Config, num_views: int, rank: int) -> OpenData:
    held_out = _synthetic_eval(config, rank, config.data.hold_out) if config.data.hold_out else None
    return OpenData(_synthetic_train(config, num_views, rank), _synthetic_val(config, rank), held_out)


def _synthetic_train(config: Config, num_views: int, rank: int) -> TrainLoader:
    num_samples = (config.data.subset or TRAIN_IMAGES[config.data.dataset]) - config.data.hold_out
    options = _synthetic(config, rank, num_samples, config.train.batch_size)
    sizes = image_data.epoch_sizes(config)
    return SyntheticTrainLoader(dataclasses.replace(options, num_views=num_views, epoch_sizes=sizes))


def _synthetic_val(config: Config, rank: int) -> EvalLoader:
    return _synthetic_eval(config, rank, TEST_IMAGES[config.data.dataset])


def _synthetic_eval(config: Config, rank: int, num_samples: int) -> EvalLoader:
    batch_size = min(config.train.eval_batch_size, num_samples)
    return SyntheticEvalLoader(_synthetic(config, rank, num_samples, batch_size))


def _synthetic(config: Config, rank: int, num_samples: int, batch_size: int) -> SyntheticOptions:
    return SyntheticOptions(
        num_samples=num_samples,
        num_classes=config.data.classes,
        image_size=config.data.pixels,
        batch_size=batch_size,
        seed=config.seed,
        device=torch.device(config.device),
        channels_last=config.channels_last == "on",
        rank=rank,
        world_size=config.ranks or 1,
    )
