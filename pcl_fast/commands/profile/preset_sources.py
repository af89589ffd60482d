"""The loaders of the variants that `pcl-fast profile` measures: the configured one, and the baselines'."""

import contextlib
import dataclasses
from collections.abc import Generator, Sequence

import torch

from datasets_prep.cifar import load_cifar
from pcl_fast.commands.data import opened_data
from pcl_fast.config import Config
from pcl_fast.contract import DeviceLoader
from pcl_fast.objectives import make_objective
from pcl_fast.profile.baseline_data import PlainLoader, PlainOptions
from pcl_fast.profile.comparison import Source
from pcl_fast.profile.usage import cores_available
from pcl_fast.profile.variants import BASELINES, variant_config
from pipelines.normalisation import NORMALISATIONS


@contextlib.contextmanager
def opened_sources(config: Config, names: Sequence[str]) -> Generator[dict[str, Source]]:
    """A source for each variant of a resolved configuration, closed with the block; none for noise.

    Each has its own: loaders on the device keep there how far their epoch has got.

    Raises:
        ConfigError: if no data set is given.
        DataError: if it cannot be used.
    """
    sources: dict[str, Source] = {}
    with contextlib.ExitStack() as stack:
        for name in names if config.data.backend != "synthetic" else ():
            opened = _straightforward if name in BASELINES else _configured
            sources[name] = stack.enter_context(opened(variant_config(name, config)))
        yield sources


@contextlib.contextmanager
def _configured(config: Config) -> Generator[Source]:
    with opened_data(config, make_objective(config).num_views) as data:
        on_device = isinstance(data.train, DeviceLoader)
        yield Source(data.train, 0 if on_device else _ahead(config))


@contextlib.contextmanager
def _straightforward(config: Config) -> Generator[Source]:
    """A baseline's: a DataLoader with a worker for each core."""
    if config.data.dataset == "imagenet":
        data = dataclasses.replace(config.data, backend="torch")
        with _configured(dataclasses.replace(config, data=data)) as source:
            yield source
        return
    arrays = load_cifar(config.data.dataset, config.data.root)
    chosen = slice(config.data.subset)
    normalisation = NORMALISATIONS[config.data.dataset]
    options = PlainOptions(
        batch_size=config.train.batch_size,
        num_views=make_objective(config).num_views,
        mean=normalisation.mean,
        std=normalisation.std,
        device=torch.device(config.device),
        channels_last=config.channels_last,
        workers=_workers(config),
        drop_last=config.data.drop_last,
    )
    images, labels = map(torch.from_numpy, (arrays.train_images[chosen], arrays.train_labels[chosen]))
    with contextlib.closing(PlainLoader(images, labels, options)) as loader:
        yield Source(loader, _ahead(config))


def _workers(config: Config) -> int:
    return cores_available() if config.data.workers is None else config.data.workers


def _ahead(config: Config) -> int:
    """What torch's workers make ahead, two batches each; other libraries make no more."""
    return 2 * _workers(config) + 2
