"""Small runs on a CUDA device, captured or not, for the tests of this folder."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from pcl_fast.config import Config
from pcl_fast.contract import OpenData, TrainLoader, ViewBatch
from pcl_fast.objectives import make_objective
from pcl_fast.run_folder import RunFolder
from pcl_fast.sinks import JsonlSink, Sink, read_records
from pcl_fast.trainer import Trainer
from pipelines.augment import NORMALISATIONS
from pipelines.order import held_out_ids
from pipelines.resident import EvalOptions, ResidentEvalLoader, ResidentTrainLoader, TrainOptions
from tests.tiny import Watcher, assert_bitwise_equal, newest_checkpoint, read_model, timeless, tiny_config

DEVICE = "cuda"
BATCH, SIZE = 16, 16
ONE_GRAPH = "the step is one CUDA graph now: captured in "
REFUSED = "the step cannot be captured in a CUDA graph ("


def config_of(capture: str = "on", dtype: str = "float32", epochs: int = 4, **changes: Any) -> Config:
    """A resolved configuration of ResNet-8 with deterministic kernels, unless `changes` say otherwise."""
    train = {"epochs": epochs, "batch_size": BATCH, "eval_batch_size": 2 * BATCH, "log_every": 7}
    usual = {"device": DEVICE, "deterministic": True, "amp": {"dtype": dtype}}
    return tiny_config(**(usual | {"train": train | changes.pop("train", {}), "capture": capture} | changes))


class HostFed:
    """A loader that only its iterator is known of, as of all that decode images."""

    def __init__(self, loader: TrainLoader) -> None:
        self._loader = loader
        self.num_samples, self.steps_per_epoch = loader.num_samples, loader.steps_per_epoch

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[ViewBatch]:
        """The loader's own batches."""
        return self._loader.epoch(epoch, first_step)


def data_of(config: Config, images: int, host_fed: bool = False, drop_last: bool = True) -> OpenData:
    """Noise around a colour for each class. Half of the labels are drawn: the loss cannot fall to nought."""
    draws = torch.Generator().manual_seed(1)
    classes = config.data.classes
    labels = torch.arange(images) % classes
    colours = torch.randint(96, 160, (classes, 3, 1, 1), generator=draws)
    noise = torch.randint(-80, 80, (images, 3, SIZE, SIZE), generator=draws)
    pixels = (colours[labels] + noise).to(torch.uint8)
    labels[::2] = torch.randint(classes, (len(labels[::2]),), generator=draws)
    options: dict[str, Any] = {
        "num_classes": classes,
        "normalisation": NORMALISATIONS["cifar10"],
        "device": torch.device(config.device),
        "channels_last": config.channels_last == "on",
    }
    train_options = TrainOptions(
        batch_size=config.train.batch_size,
        num_views=make_objective(config).num_views,
        seed=config.seed,
        drop_last=drop_last,
        hold_out=config.data.hold_out,
        **options,
    )
    loader = ResidentTrainLoader(pixels, labels, train_options)
    shown = min(images, 40)
    eval_options = EvalOptions(batch_size=config.train.eval_batch_size, **options)
    val = ResidentEvalLoader(pixels[:shown], labels[:shown], eval_options)
    ids = held_out_ids(images, config.data.hold_out, config.seed)
    held_out = ResidentEvalLoader(pixels[ids], labels[ids], eval_options) if len(ids) else None
    return OpenData(HostFed(loader) if host_fed else loader, val, held_out)


def make_trainer(
    path: Path, config: Config, data: OpenData, sinks: Sequence[Sink] = ()
) -> tuple[Trainer, Watcher]:
    """A trainer, and what it will say."""
    watcher, folder = Watcher(), RunFolder(path)
    return Trainer(config, data, folder, [JsonlSink(folder.metrics), watcher, *sinks]), watcher


def run(path: Path, config: Config, images: int = 8 * BATCH, **data: Any) -> list[str]:
    """Train (or go on), and return what was said."""
    trainer, watcher = make_trainer(path, config, data_of(config, images, **data))
    trainer.run()
    return watcher.messages


def graphs(said: Sequence[str]) -> int:
    """How many graphs were made; nothing else was said."""
    assert [message for message in said if not message.startswith(ONE_GRAPH)] == []
    return len(said)


def assert_same(one: Path, other: Path) -> None:
    """Two runs ended with the same bits: weights, averages, buffers, momentum, progress, records, product."""
    checkpoints = [newest_checkpoint(path) for path in (one, other)]
    for content in checkpoints:
        for rank in content["ranks"]:
            del rank["rng"]  # of which nothing is drawn
    assert_bitwise_equal(*checkpoints)
    left, right = (timeless(read_records(path / "metrics.jsonl")) for path in (one, other))
    assert left == right
    assert_bitwise_equal(*(read_model(path / "model.safetensors") for path in (one, other)))
