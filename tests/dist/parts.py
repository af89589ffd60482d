"""A run's parts on one rank of several: few, small images; steps are the same for any number of ranks."""

import zlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pcl_fast.config import Config
from pcl_fast.contract import OpenData, TrainLoader, ViewBatch
from pcl_fast.objectives import make_objective
from pcl_fast.step.state import TrainState
from pipelines.normalisation import NORMALISATIONS
from pipelines.order import held_out_ids
from pipelines.resident import EvalOptions, ResidentEvalLoader, ResidentTrainLoader, TrainOptions
from tests.tiny import tiny_config

GLOBAL_BATCH, CLASSES, SIZE = 8, 10, 8
CPU = torch.device("cpu")


def config_of(ranks: int, **changes: Any) -> Config:
    """Of so many ranks with one global batch; `changes` as of `tiny_config`."""
    train = {"batch_size": GLOBAL_BATCH // ranks} | changes.pop("train", {})
    return tiny_config(ranks=ranks, train=train, **changes)


def data_of(config: Config, rank: int, count: int = 32, shown: int = 20, drop_last: bool = True) -> OpenData:
    """A rank's loaders of `count` random images to learn, and `shown` to be evaluated on."""
    draws = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (count, 3, SIZE, SIZE), generator=draws, dtype=torch.uint8)
    labels = torch.randint(CLASSES, (count,), generator=draws)
    known = torch.randint(0, 256, (shown, 3, SIZE, SIZE), generator=draws, dtype=torch.uint8)
    options: dict[str, Any] = {
        "num_classes": CLASSES,
        "normalisation": NORMALISATIONS["cifar10"],
        "device": torch.device(config.device),
        "channels_last": config.channels_last == "on",
        "rank": rank,
        "world_size": config.ranks,
    }
    train_options = TrainOptions(
        batch_size=config.train.batch_size,
        num_views=make_objective(config).num_views,
        seed=config.seed,
        drop_last=drop_last,
        hold_out=config.data.hold_out,
        **options,
    )
    eval_options = EvalOptions(batch_size=config.train.eval_batch_size, **options)
    answers = torch.randint(CLASSES, (shown,), generator=draws)
    ids = held_out_ids(count, config.data.hold_out, config.seed)
    return OpenData(
        ResidentTrainLoader(images, labels, train_options),
        ResidentEvalLoader(known, answers, eval_options),
        ResidentEvalLoader(images[ids], labels[ids], eval_options) if len(ids) else None,
    )


class Precise:
    """A loader's batches in float64; only its iterator is known."""

    def __init__(self, loader: TrainLoader) -> None:
        self._loader = loader
        self.num_samples, self.steps_per_epoch = loader.num_samples, loader.steps_per_epoch

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[ViewBatch]:
        """The same numbers, exactly."""
        for batch in self._loader.epoch(epoch, first_step):
            yield ViewBatch(batch.views_VBCHW.double(), batch.labels_B, batch.sample_ids_B)


def tensors_of(state: TrainState) -> dict[str, Tensor]:
    """All that a step changes, in memory of its own: weights, averages, statistics, momentum."""
    content = state.state_dict()
    return {
        f"{part}/{name}": tensor
        for part in ("network", "mean_teacher", "momentum")
        for name, tensor in (content[part] or {}).items()
    }


def digest(state: TrainState) -> int:
    """Equal if all of these bits are."""
    crc = 0
    for tensor in tensors_of(state).values():
        crc = zlib.crc32(tensor.contiguous().view(-1).view(torch.uint8).numpy().data, crc)
    return crc
