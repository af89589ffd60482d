"""Runs with label smoothing, mixup, cutout and colour jitter at once: as exact as others, and they learn."""

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from pcl_fast.config import Config
from pcl_fast.contract import OpenData
from pcl_fast.errors import ConfigError, Preempted
from pcl_fast.run_folder import RunFolder
from pcl_fast.sinks import JsonlSink
from pcl_fast.trainer import Trainer, train_together
from pipelines.colours import ColourRule
from pipelines.cutout import CutoutLoader, with_cutout
from pipelines.resident import ResidentEvalLoader, ResidentTrainLoader
from tests.test_train_together import assert_same
from tests.tiny import (
    BATCH,
    IMAGE_SIZE,
    STEPS_PER_EPOCH,
    SignalAtStep,
    assert_same_run,
    newest_checkpoint,
    read_model,
    tiny_config,
    tiny_data,
    train,
)

CPU = torch.device("cpu")
EVERYTHING: dict[str, Any] = {
    "train": {"label_smoothing": 0.1, "mixup": 0.4},
    "data": {"cutout": 6, "color_jitter": 0.4},
}


def config_of(**changes: Any) -> Config:
    return tiny_config(**(EVERYTHING | changes))


def data_of(config: Config) -> OpenData:
    """As the commands open it."""
    data = tiny_data(config)
    assert isinstance(data.train, ResidentTrainLoader)
    colours = ColourRule.of(config.data.color_jitter)
    data.train.options = dataclasses.replace(data.train.options, colours=colours)
    cut = with_cutout(data.train, config.data.cutout, config.seed, CPU)
    return dataclasses.replace(data, train=cut)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("straight") / "run"
    train(path, config_of(), data=data_of(config_of()))
    return path


@pytest.mark.parametrize("step", [2, 5])
def test_resuming_within_an_epoch_changes_nothing(straight: Path, tmp_path: Path, step: int) -> None:
    config = config_of()
    with pytest.raises(Preempted):
        train(tmp_path / "run", config, [SignalAtStep(step)], data_of(config))
    assert newest_checkpoint(tmp_path / "run")["progress"]["steps_done"] == step
    train(tmp_path / "run", config, data=data_of(config))
    assert_same_run(tmp_path / "run", straight)


@pytest.mark.parametrize("part", ["label_smoothing", "mixup", "cutout", "color_jitter"])
def test_each_of_them_counts(straight: Path, tmp_path: Path, part: str) -> None:
    """Without it the run is another one; a folder that has it refuses to go on without."""
    group = "train" if part in EVERYTHING["train"] else "data"
    config = config_of(**{group: EVERYTHING[group] | {part: 0}})
    train(tmp_path / "run", config, data=data_of(config))
    ours, theirs = (read_model(path / "model.safetensors") for path in (tmp_path / "run", straight))
    assert ours["tensors"].keys() == theirs["tensors"].keys()
    for name, tensor in ours["tensors"].items():
        assert tensor.dtype == torch.int64 or not torch.equal(tensor, theirs["tensors"][name]), name
    with pytest.raises(ConfigError, match=f"{group}.{part}: "):
        RunFolder(straight).claim(config)


def test_several_seeds_at_once_end_as_each_alone(straight: Path, tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        trainers: list[Trainer] = []
        for seed in range(2):
            config, folder = config_of(seed=seed), RunFolder(tmp_path / str(seed))
            stack.callback(folder.claim(config).close)
            trainers.append(Trainer(config, data_of(config), folder, [JsonlSink(folder.metrics)]))
        train_together(trainers)
    assert_same(tmp_path / "0", straight)
    with pytest.raises(AssertionError):
        assert_same(tmp_path / "1", straight)


def plain_colours(config: Config) -> OpenData:
    """As many images as ever, each of one colour, that of its class."""
    palette = torch.randint(0, 256, (10, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    labels = torch.arange(STEPS_PER_EPOCH * BATCH) % 10
    images = palette[labels][..., None, None].expand(-1, -1, IMAGE_SIZE, IMAGE_SIZE).clone()
    usual = data_of(config)
    assert isinstance(usual.train, CutoutLoader)
    assert isinstance(usual.train.loader, ResidentTrainLoader)
    options = usual.train.loader.options
    cut = with_cutout(ResidentTrainLoader(images, labels, options), config.data.cutout, config.seed, CPU)
    return OpenData(cut, ResidentEvalLoader(images, labels, options))


@pytest.mark.timeout(60)
def test_it_learns_nevertheless(tmp_path: Path) -> None:
    """Ten classes that colours tell apart; by chance 10 % are right."""
    config = config_of(train=EVERYTHING["train"] | {"epochs": 15, "eval_every": 15, "save_every": 15})
    trainer = train(tmp_path / "run", config, data=plain_colours(config))
    assert trainer.accuracies["ensemble"]["top1"] >= 40
