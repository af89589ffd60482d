"""Opening the data set of a run: the one place where data sets, pipelines and trainer meet."""

import torch

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
            "ImageNet cannot be read yet; to time this preset on random images: --data.backend synthetic"
        )
    return _open_resident(config, num_views, load_cifar(config.data.dataset, config.data.root))


def _open_resident(config: Config, num_views: int, arrays: CifarArrays) -> OpenData:
    subset, available = config.data.subset, len(arrays.train_images)
    if subset is not None and subset > available:
        raise ConfigError(f"--data.subset {subset}: {config.data.dataset} has {available} training images")
    eval_options = EvalOptions(
        batch_size=config.train.eval_batch_size,
        num_classes=arrays.num_classes,
        normalisation=NORMALISATIONS[config.data.dataset],
        device=torch.device(config.device),
        channels_last=config.channels_last == "on",
    )
    train_options = TrainOptions(
        batch_size=config.train.batch_size,
        num_classes=eval_options.num_classes,
        normalisation=eval_options.normalisation,
        device=eval_options.device,
        channels_last=eval_options.channels_last,
        num_views=num_views,
        seed=config.seed,
        drop_last=config.data.drop_last,
    )
    images, labels = map(torch.from_numpy, (arrays.train_images[:subset], arrays.train_labels[:subset]))
    train = ResidentTrainLoader(images, labels, train_options)
    images, labels = map(torch.from_numpy, (arrays.test_images, arrays.test_labels))
    return OpenData(train, ResidentEvalLoader(images, labels, eval_options))


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
