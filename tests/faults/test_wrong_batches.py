"""A loader that does not keep the contract is refused before the network has learned from it."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pcl_fast.build import build_state
from pcl_fast.contract import EvalBatch, EvalLoader, OpenData, TrainLoader, ViewBatch
from pcl_fast.errors import DataError
from pcl_fast.run_folder import RunFolder
from pcl_fast.trainer import Trainer
from tests.tiny import assert_bitwise_equal, tiny_config, tiny_data, train


@dataclasses.dataclass
class WrongTraining:
    """A training loader whose every batch has gone through `change`."""

    loader: TrainLoader
    change: Callable[[ViewBatch], dict[str, Any]]

    @property
    def num_samples(self) -> int:
        return self.loader.num_samples

    @property
    def steps_per_epoch(self) -> int:
        return self.loader.steps_per_epoch

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[ViewBatch]:
        for batch in self.loader.epoch(epoch, first_step):
            yield dataclasses.replace(batch, **self.change(batch))


@dataclasses.dataclass
class WrongEvaluation:
    """An evaluation loader whose labels begin at 10."""

    loader: EvalLoader

    @property
    def num_samples(self) -> int:
        return self.loader.num_samples

    def __iter__(self) -> Iterator[EvalBatch]:
        for batch in self.loader:
            yield EvalBatch(batch.images_BCHW, batch.labels_B + 10)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda batch: {"views_VBCHW": batch.views_VBCHW.double()}, "images of torch.float64"),
        (lambda batch: {"views_VBCHW": batch.views_VBCHW[:1]}, "1 views of every image: it must make 2"),
        (lambda batch: {"views_VBCHW": batch.views_VBCHW / 0}, "pixels that are not finite"),
        (lambda batch: {"labels_B": batch.labels_B + 10}, "the label 1[0-9]: labels of 10 classes"),
    ],
)
def test_training_does_not_begin(tmp_path: Path, change: Any, words: str) -> None:
    config = tiny_config()
    data = tiny_data(config)
    trainer = Trainer(config, OpenData(WrongTraining(data.train, change), data.val), RunFolder(tmp_path), [])
    with pytest.raises(DataError, match=words):
        trainer.run()
    assert_bitwise_equal(trainer.state.state_dict(), build_state(config).state_dict())


def test_evaluation_does_not_begin(tmp_path: Path) -> None:
    config = tiny_config()
    data = tiny_data(config)
    with pytest.raises(DataError, match=r"the label 1[0-9]: labels of 10 classes"):
        train(tmp_path, config, data=OpenData(data.train, WrongEvaluation(data.val)))
