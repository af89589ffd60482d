"""The loop around the step: what is recorded, evaluated, saved and deployed, and when."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from pcl_fast.build import build_state
from pcl_fast.checkpoint import CheckpointStore
from pcl_fast.contract import ViewBatch
from pcl_fast.errors import PclError
from pcl_fast.models.zoo import find_backbone
from pcl_fast.run_folder import RunFolder
from pcl_fast.sinks import CurvesSink, Record, read_records
from pcl_fast.step.train_step import Moment, train_step
from pcl_fast.trainer import Trainer
from tests.tiny import (
    BATCH,
    EPOCHS,
    STEPS,
    STEPS_PER_EPOCH,
    VAL_IMAGES,
    Watcher,
    assert_bitwise_equal,
    newest_checkpoint,
    read_model,
    timeless,
    tiny_config,
    tiny_data,
    train,
)


def places(records: list[Record], kind: str) -> list[int]:
    return [record["step"] for record in records if record["kind"] == kind]


def by_hand() -> list[dict[str, Any]]:
    """Terms, loss, right answers and schedules of each step, from the step alone and the paper's formulas."""
    config = tiny_config()
    state, data = build_state(config), tiny_data(config)
    assert config.pcl.rampup_epochs is not None
    history: list[dict[str, Any]] = []
    for epoch in range(EPOCHS):
        for batch in data.train.epoch(epoch):
            step = len(history) + 1
            weight = math.exp(-5 * (1 - epoch / config.pcl.rampup_epochs) ** 2)
            moment = Moment(
                step=step,
                lr=0.1 * 0.1 ** sum(epoch >= share * EPOCHS for share in (0.5, 0.75)),
                distill_weight=1.0 if epoch > config.pcl.rampup_epochs else weight,
                ema_coefficient=min(1 - 1 / step, config.pcl.ema_decay),
            )
            measured = train_step(state, batch, moment)
            terms = dict(zip(state.objective.term_names, measured.terms.double().tolist(), strict=True))
            row: dict[str, Any] = {"epoch": epoch, "terms": terms, "correct": measured.correct.tolist()}
            history.append(row | dataclasses.asdict(moment) | {"norm": float(measured.gradient_norm)})
    return history


def assert_means(record: Record, steps: list[dict[str, Any]]) -> None:
    """A record holds the means of these steps, and the schedules of the last of them."""
    for name in record["terms"]:
        mean = sum(step["terms"][name] for step in steps) / len(steps)
        assert record["terms"][name] == pytest.approx(mean, rel=1e-6)
    assert record["loss"] == pytest.approx(sum(record["terms"].values()), rel=1e-12)
    assert record["gradient_norm"] == pytest.approx(sum(s["norm"] for s in steps) / len(steps), rel=1e-6)
    for place, top1 in enumerate(record["train_top1"].values()):
        right = sum(step["correct"][place] for step in steps)
        assert top1 == pytest.approx(100 * right / (BATCH * len(steps)), rel=1e-12)
    for key in ("epoch", "step", "lr", "distill_weight", "ema_coefficient"):
        assert record[key] == pytest.approx(steps[-1][key], rel=1e-12)
    assert record["images_per_second"] > 0


def test_records_are_the_means_of_their_steps(tmp_path: Path) -> None:
    """Those every three steps go on across the epochs; those of an epoch have exactly its steps."""
    watcher = Watcher()
    train(tmp_path, sinks=[watcher])
    steps, records = by_hand(), watcher.records
    assert [(record["kind"], record["step"]) for record in records] == [
        ("step", 3),
        ("epoch", 4),
        ("step", 6),
        ("epoch", 8),
    ]
    assert list(records[0]["terms"]) == [*records[3]["terms"]] == list(steps[0]["terms"])
    assert list(records[0]["train_top1"]) == ["peer1", "peer2", "ensemble"]
    for record, (first, last) in zip(records, [(0, 3), (0, 4), (3, 6), (4, 8)], strict=True):
        assert_means(record, steps[first:last])
    assert watcher.steps == list(range(1, STEPS + 1))
    assert watcher.closings == 1
    assert timeless(records) == timeless(read_records(tmp_path / "metrics.jsonl"))


@pytest.mark.parametrize("log_every", [1, 4, 100])
def test_how_often_is_logged_changes_the_log_only(tmp_path: Path, log_every: int) -> None:
    config = tiny_config(train={"log_every": log_every})
    train(tmp_path / "run", config)
    train(tmp_path / "other")
    records = read_records(tmp_path / "run" / "metrics.jsonl")
    assert places(records, "step") == list(range(log_every, STEPS + 1, log_every))
    one, other = (newest_checkpoint(tmp_path / name)["state"] for name in ("run", "other"))
    assert_bitwise_equal(one, other)


def test_epochs_that_follow_soon_are_not_saved_but_the_last_is(tmp_path: Path) -> None:
    saved: list[bool] = []

    class Looking(Watcher):
        def recorded(self, record: Record) -> None:
            saved.append((tmp_path / "checkpoints").exists())

    train(tmp_path, tiny_config(train={"epochs": 3, "save_seconds": 1000, "log_every": 100}), [Looking()])
    assert saved == [False, False, False]
    assert newest_checkpoint(tmp_path)["progress"]["epochs_closed"] == 3


def test_evaluation_and_saving_come_as_configured_and_after_the_last_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[int] = []
    save = CheckpointStore.save

    def noting(store: CheckpointStore, content: dict[str, Any], step: int) -> None:
        saved.append(step)
        save(store, content, step)

    monkeypatch.setattr(CheckpointStore, "save", noting)
    watcher = Watcher()
    train(tmp_path, tiny_config(train={"epochs": 5, "eval_every": 3, "save_every": 2}), [watcher])
    epochs = [record for record in watcher.records if record["kind"] == "epoch"]
    assert ["val" in record for record in epochs] == [False, False, True, False, True]
    assert saved == [8, 16, 20]
    assert [path.name for path in RunFolder(tmp_path).checkpoints.paths()] == [
        "step-00000016.pt",
        "step-00000020.pt",
    ]


def test_every_head_is_evaluated_on_every_image(tmp_path: Path) -> None:
    trainer = train(tmp_path)
    last = read_records(tmp_path / "metrics.jsonl")[-1]["val"]
    heads = ["peer1", "peer2", "ensemble", "mean_teacher1", "mean_teacher2", "mean_ensemble"]
    assert list(last) == heads
    assert trainer.accuracies == last
    assert trainer.run() == last, "a finished run has its result"
    for head in last.values():
        assert head["images"] == VAL_IMAGES
        assert head["top1"] <= head["top5"]
        assert head["top1"] * VAL_IMAGES / 100 == pytest.approx(
            round(head["top1"] * VAL_IMAGES / 100), abs=1e-9
        )
        assert head["loss"] > 0


def test_evaluation_uses_running_statistics_and_leaves_training_as_it_was(tmp_path: Path) -> None:
    """A run evaluated twice as often trains the same bits."""
    train(tmp_path / "often", tiny_config(train={"eval_every": 1, "epochs": 3}))
    train(tmp_path / "once", tiny_config(train={"eval_every": 3, "epochs": 3}))
    one, other = (newest_checkpoint(tmp_path / name)["state"] for name in ("often", "once"))
    assert_bitwise_equal(one, other)


@pytest.mark.parametrize(("method", "head"), [("pcl", "mean_teacher1"), ("vanilla", "peer1")])
def test_the_deployed_network_is_the_plain_backbone_and_reaches_what_is_reported(
    tmp_path: Path, method: str, head: str
) -> None:
    config = tiny_config(method=method)
    trainer = train(tmp_path, config)
    assert trainer.objective.headline[{"pcl": "PCL", "vanilla": "vanilla"}[method]] == head
    model = read_model(tmp_path / "model.safetensors")
    assert model["about"] == {"model": "resnet8", "method": method, "dataset": "cifar10", "steps": str(STEPS)}
    plain = find_backbone("resnet8").build(10)
    plain.load_state_dict(model["tensors"], strict=True)
    plain.eval()
    right = losses = 0.0
    with torch.no_grad():
        for batch in tiny_data(config).val:
            logits_BC = plain(batch.images_BCHW)
            right += (logits_BC.argmax(-1) == batch.labels_B).sum().item()
            losses += torch.nn.functional.cross_entropy(logits_BC, batch.labels_B, reduction="sum").item()
    reported = trainer.accuracies[head]
    assert reported["top1"] == pytest.approx(100 * right / VAL_IMAGES, abs=1e-9)
    assert reported["loss"] == pytest.approx(losses / VAL_IMAGES, rel=1e-5)
    assert reported["loss"] != trainer.accuracies.get("peer2", {}).get("loss")


def test_a_sink_that_cannot_write_does_not_end_the_run(tmp_path: Path) -> None:
    class Broken(Watcher):
        def recorded(self, record: Record) -> None:
            raise OSError(28, "No space left on device")

        said = recorded  # pyright: ignore[reportAssignmentType]

    watcher = Watcher()
    (tmp_path / "folder").mkdir()
    curves = CurvesSink(tmp_path / "folder", tmp_path / "metrics.jsonl")  # a picture cannot replace a folder
    (tmp_path / "folder" / "occupied").touch()
    train(tmp_path, sinks=[Broken(), curves, watcher])
    assert len(watcher.records) == 4
    assert (
        watcher.messages[:4]
        == ["Broken could not write ([Errno 28] No space left on device); training goes on"] * 4
    )
    assert watcher.messages[4].startswith("CurvesSink could not write")
    assert watcher.closings == 1


def test_a_fault_of_the_loader_reaches_the_caller_and_closes_the_sinks(tmp_path: Path) -> None:
    class Failing:
        num_samples, steps_per_epoch = 32, STEPS_PER_EPOCH

        def epoch(self, epoch: int, first_step: int = 0) -> Any:
            batches = tiny_data(tiny_config()).train.epoch(epoch, first_step)
            yield next(batches)
            raise PclError("the disk is on fire")

    watcher, config = Watcher(), tiny_config()
    with pytest.raises(PclError, match="the disk is on fire"):
        train(tmp_path, config, [watcher], dataclasses.replace(tiny_data(config), train=Failing()))
    assert watcher.steps == [1]
    assert watcher.closings == 1
    train(tmp_path)  # the folder is free again


def test_the_callers_random_numbers_choose_nothing(tmp_path: Path) -> None:
    for number in (1, 2):
        torch.manual_seed(number)
        train(tmp_path / str(number))
    one, other = (newest_checkpoint(tmp_path / str(number)) for number in (1, 2))
    assert_bitwise_equal(one, other)


def test_every_sample_is_used_once_an_epoch(tmp_path: Path) -> None:
    """And each epoch in an order of its own."""
    used: list[list[int]] = []
    config = tiny_config()
    data = tiny_data(config)

    class Noting:
        num_samples, steps_per_epoch = 32, STEPS_PER_EPOCH

        def epoch(self, epoch: int, first_step: int = 0) -> Any:
            for batch in data.train.epoch(epoch, first_step):
                assert isinstance(batch, ViewBatch)
                used.append(batch.sample_ids_B.tolist())
                yield batch

    folder = RunFolder(tmp_path)
    Trainer(config, dataclasses.replace(data, train=Noting()), folder, []).run()
    for epoch in range(EPOCHS):
        batches = used[epoch * STEPS_PER_EPOCH : (epoch + 1) * STEPS_PER_EPOCH]
        assert sorted(sample for batch in batches for sample in batch) == list(range(32))
    assert used[:STEPS_PER_EPOCH] != used[STEPS_PER_EPOCH:]
