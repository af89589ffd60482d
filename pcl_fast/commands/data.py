"""Opening the data set of a run: the one place where data sets, pipelines and trainer meet."""

import numpy as np
import torch
from numpy.typing import NDArray

from datasets_prep.cifar import CifarArrays, load_cifar
from pcl_fast.config import IMAGE_SIZES, NUM_CLASSES, TEST_IMAGES, TRAIN_IMAGES, Config
from pcl_fast.contract import OpenData
from pcl_fast.errors import ConfigError, DataError
from pipelines.augment import NORMALISATIONS
from pipelines.resident import EvalOptions, ResidentEvalLoader, ResidentTrainLoader, TrainOptions
from pipelines.synthetic import SyntheticEvalLoader, SyntheticOptions, SyntheticTrainLoader


def open_data(config: Config, num_views: int) -> OpenData:
    """The loaders of a resolved configuration, with `num_views` views of every training image.

    DataError if the data set is not there or not as it should be.
    """
    if config.data.backend == "synthetic":
        return _open_synthetic(config, num_views)
    if config.data.dataset == "imagenet":
        raise DataError(
            "ImageNet cannot be read yet: --data.backend synthetic trains this preset on random images, to time it"
        )
    return _open_resident(config, num_views, load_cifar(config.data.dataset, config.data.root))


def _open_resident(config: Config, num_views: int, arrays: CifarArrays) -> OpenData:
    subset, available = config.data.subset, len(arrays.train_images)
    if subset is not None and subset > available:
        raise ConfigError(f"--data.subset {subset}: {config.data.dataset} has {available} training images")
    options = {
        "num_classes": arrays.num_classes,
        "normalisation": NORMALISATIONS[config.data.dataset],
        "device": torch.device(config.device),
        "channels_last": config.channels_last == "on",
    }
    train_options = TrainOptions(
        batch_size=config.train.batch_size,
        num_views=num_views,
        seed=config.seed,
        drop_last=config.data.drop_last,
        **options,
    )
    images, labels = _tensors(arrays.train_images[:subset], arrays.train_labels[:subset])
    train = ResidentTrainLoader(images, labels, train_options)
    images, labels = _tensors(arrays.test_images, arrays.test_labels)
    val = ResidentEvalLoader(images, labels, EvalOptions(batch_size=config.train.eval_batch_size, **options))
    return OpenData(train, val)


def _open_synthetic(config: Config, num_views: int) -> OpenData:
    dataset = config.data.dataset

    def options(num_samples: int, batch_size: int, views: int) -> SyntheticOptions:
        return SyntheticOptions(
            num_samples=num_samples,
            num_classes=NUM_CLASSES[dataset],
            image_size=IMAGE_SIZES[dataset],
            batch_size=batch_size,
            seed=config.seed,
            device=torch.device(config.device),
            num_views=views,
            channels_last=config.channels_last == "on",
        )

    num_train = config.data.subset or TRAIN_IMAGES[dataset]
    train = SyntheticTrainLoader(options(num_train, config.train.batch_size, num_views))
    val_batch = min(config.train.eval_batch_size, TEST_IMAGES[dataset])
    return OpenData(train, SyntheticEvalLoader(options(TEST_IMAGES[dataset], val_batch, 1)))


def _tensors(images: NDArray[np.uint8], labels: NDArray[np.int64]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(images), torch.from_numpy(labels)
