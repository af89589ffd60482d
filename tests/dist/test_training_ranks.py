"""Whole runs on two ranks: what they write down, and how they evaluate."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pcl_fast.build import build_state
from pcl_fast.contract import ViewBatch
from pcl_fast.evaluate import tally_state
from pcl_fast.metrics import accuracies, compared
from pcl_fast.sinks import Record, read_records
from pcl_fast.step import device_step
from pcl_fast.step.state import TrainState
from pcl_fast.step.train_step import Moment, StepMetrics, train_step
from tests.dist.parts import config_of, data_of
from tests.dist.ranks import run_ranks
from tests.dist.runs import train_rank
from tests.tiny import newest_checkpoint

IMAGES, SHOWN, LOG_EVERY = 29, 103, 3  # steps of 8, 8, 8 and 5 images
SHORT = {"log_every": LOG_EVERY, "eval_batch_size": 10}


def overheard(path: Path) -> dict[str, Any]:
    """Train on this rank, and note what every step of its own measured: images, then all numbers."""
    rows: list[tuple[int, Tensor]] = []

    def listening(state: TrainState, batch: ViewBatch, moment: Moment) -> StepMetrics:
        metrics = train_step(state, batch, moment)
        images = len(batch.labels_B)
        values = metrics.terms, metrics.gradient_norm[None], metrics.correct.double() / images
        rows.append((images, torch.cat([value.double() for value in values])))
        return metrics

    device_step.train_step = listening
    return train_rank(path, config_of(2, train=SHORT), count=IMAGES, shown=SHOWN, drop_last=False) | {
        "rows": rows
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """A run's folder, and what each rank says of it."""
    folder = tmp_path_factory.mktemp("run")
    return folder / "run", run_ranks(folder / "ranks", 2, overheard, [folder / "run"])


def numbers(record: Record) -> list[float]:
    return [
        *record["terms"].values(),
        record["gradient_norm"],
        *(n / 100 for n in record["train_top1"].values()),
    ]


def test_records_are_means_over_all_ranks_samples(run: tuple[Path, list[dict[str, Any]]]) -> None:
    path, ranks = run
    records = list(read_records(path / "metrics.jsonl"))
    shares = [[images for images, _ in rank["rows"]] for rank in ranks]
    assert shares == [[4, 4, 4, 2] * 2, [4, 4, 4, 3] * 2]

    def by_hand(begin: int, end: int) -> Tensor:
        rows = [row for rank in ranks for row in rank["rows"][begin:end]]
        sums = torch.stack([images * values for images, values in rows]).sum(0)
        return sums / sum(images for images, _ in rows)

    steps = [record for record in records if record["kind"] == "step"]
    epochs = [record for record in records if record["kind"] == "epoch"]
    assert [record["step"] for record in steps] == [3, 6]
    assert [record["step"] for record in epochs] == [4, 8]
    spans = [(record, record["step"] - LOG_EVERY) for record in steps]
    spans += [(record, record["step"] - 4) for record in epochs]
    for record, begin in spans:
        expected = by_hand(begin, record["step"])
        found = torch.tensor(numbers(record), dtype=torch.float64)
        torch.testing.assert_close(found, expected, rtol=2**-24, atol=0)  # products with the images round
        assert record["loss"] == pytest.approx(sum(record["terms"].values()), rel=1e-12)
        assert record["images_per_second"] > 0
    of_one = [torch.stack([values for _, values in rank["rows"]]) for rank in ranks]
    assert torch.equal(of_one[0][:, 7], of_one[1][:, 7]), "one gradient norm for all"
    assert not torch.isclose(of_one[0][:, :7], of_one[1][:, :7]).any(), "but each its own terms"


def evaluated_alone(path: Path, shown: int) -> dict[str, Any]:
    """What one process finds of the last checkpoint: of every head, and between them."""
    config = config_of(1, train=SHORT)
    state = build_state(config)
    state.load_state_dict(newest_checkpoint(path)["state"])
    loader = data_of(config, 0, shown=shown, count=IMAGES, drop_last=False).val
    tally = tally_state(state, loader)
    between = compared([tally])
    assert between is not None
    return {head: found.as_dict() for head, found in accuracies([tally]).items()} | {
        "between": between.as_dict()
    }


def check_evaluation(path: Path, ranks: list[dict[str, Any]], shown: int) -> None:
    expected = evaluated_alone(path, shown)
    record, between = list(read_records(path / "metrics.jsonl"))[-1], expected.pop("between")
    assert {"peer1", "ensemble", "mean_teacher2", "mean_ensemble"} < expected.keys()
    assert record["between"]["heads"] == between["heads"] == list(expected)
    assert record["between"]["agreement"] == between["agreement"]
    for measure in ("kl", "distance"):
        found, wanted = (np.array(each[measure]) for each in (record["between"], between))
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-9)
    for found in (record["val"], *(rank["accuracies"] for rank in ranks)):
        assert found.keys() == expected.keys()
        for head, wanted in expected.items():
            for count in ("images", "top1", "top5"):
                assert found[head][count] == wanted[count], (head, count)
            assert found[head]["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
            assert found[head]["ece"] == pytest.approx(wanted["ece"], rel=1e-4)
            assert found[head]["images"] == shown


def test_two_ranks_count_103_images_as_one_does(run: tuple[Path, list[dict[str, Any]]]) -> None:
    check_evaluation(*run, SHOWN)
    assert any(head["top1"] not in (0, 100) for head in run[1][0]["accuracies"].values())


def test_fewer_images_to_evaluate_than_ranks(tmp_path: Path) -> None:
    ranks = run_ranks(tmp_path / "ranks", 2, train_one_image, [tmp_path / "run"])
    check_evaluation(tmp_path / "run", ranks, 1)


def train_one_image(path: Path) -> dict[str, Any]:
    return train_rank(path, config_of(2, train=SHORT), count=IMAGES, shown=1, drop_last=False)
