"""KDCL general through the product: weights measured after every epoch, saved, gone on with, and of use."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pcl_fast.build import build_state
from pcl_fast.cli import main
from pcl_fast.config import Config, KdclConfig
from pcl_fast.contract import EvalBatch, EvalLoader, OpenData
from pcl_fast.errors import DataError, Preempted
from pcl_fast.held_out import Observed, learn, observe
from pcl_fast.objectives.kdcl import least_error_weights
from pcl_fast.sinks import read_records
from tests.commands.conftest import cifar_folder, small_cifar
from tests.tiny import (
    SignalAtStep,
    SignalInEvaluation,
    assert_same_run,
    newest_checkpoint,
    read_model,
    tiny_config,
    tiny_data,
    train,
)

__all__ = ["cifar_folder", "small_cifar"]  # fixtures
HELD, PEERS = 8, 2
STEPS_PER_EPOCH, EPOCHS = 3, 4


def config_of(**changes: Any) -> Config:
    """Of 32 images 8 are held out; four epochs of three steps, of which every second is evaluated."""
    usual: dict[str, Any] = {
        "method": "kdcl",
        "kdcl": KdclConfig(num_peers=PEERS, target="general"),
        "data": {"hold_out": HELD},
        "train": {"epochs": EPOCHS, "eval_every": 2, "eval_batch_size": 4},
    }
    return tiny_config(**(usual | changes))


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("straight")
    train(folder, config_of())
    return folder


def weights_of(folder: Path) -> list[list[float]]:
    """Those of every epoch."""
    records = read_records(folder / "metrics.jsonl")
    assert all("held_out" not in record for record in records if record["kind"] == "step")
    return [record["held_out"]["weights"] for record in records if record["kind"] == "epoch"]


def test_weights_are_measured_after_every_epoch_and_written_down(straight: Path) -> None:
    found = weights_of(straight)
    assert len(found) == EPOCHS
    assert len({tuple(weights) for weights in found}) == EPOCHS, "each epoch changes them"
    for weights in found:
        assert sum(weights) == pytest.approx(1.0, rel=1e-12)
        assert max(abs(weight - 1 / PEERS) for weight in weights) > 1e-6
    saved = newest_checkpoint(straight)["state"]["memory"]["weights"]
    assert saved.dtype == torch.float64
    assert saved.tolist() == found[-1]
    assert "weights" not in read_model(straight / "model.safetensors")["tensors"]


def test_they_are_those_of_the_saved_networks_by_an_independent_measurement(straight: Path) -> None:
    """Eval mode, un-augmented images, softmaxes at temperature 1; numpy's inverse."""
    config = config_of()
    state = build_state(config)
    state.load_state_dict(newest_checkpoint(straight)["state"])
    (loader,) = (data.held_out for data in [tiny_data(config)])
    assert loader is not None
    with torch.no_grad():
        network = state.network.eval()
        pairs = [(network(batch.images_BCHW[None]).logits_VBC, batch.labels_B) for batch in loader]
    z_VBC = torch.cat([z for z, _ in pairs], 1).double()
    hot_BC = torch.nn.functional.one_hot(torch.cat([labels for _, labels in pairs]), 10)
    errors = z_VBC.softmax(-1) - hot_BC
    assert errors.shape == (PEERS, HELD, 10)
    expected = least_error_weights(torch.einsum("ibc,jbc->ij", errors, errors) / (HELD * 10))
    torch.testing.assert_close(
        torch.tensor(weights_of(straight)[-1]).double(), expected, rtol=1e-6, atol=1e-9
    )


@pytest.mark.parametrize("step", [3, 4, 12])
def test_a_run_that_was_stopped_ends_as_one_that_was_not(step: int, straight: Path, tmp_path: Path) -> None:
    with pytest.raises(Preempted):
        train(tmp_path, config_of(), [SignalAtStep(step)])
    train(tmp_path, config_of())
    assert_same_run(tmp_path, straight)


@pytest.mark.parametrize("which", ["held_out", "val"])
@pytest.mark.parametrize("pass_", [1, 2])
def test_a_signal_while_they_are_measured_is_served_and_nothing_changes(
    which: str, pass_: int, straight: Path, tmp_path: Path
) -> None:
    """Or in the evaluation, by when they are new: what was measured twice is the same."""
    data = tiny_data(config_of())
    watched = SignalInEvaluation(getattr(data, which), pass_)
    with pytest.raises(Preempted):
        train(tmp_path, config_of(), data=dataclasses.replace(data, **{which: watched}))
    assert watched.passes == pass_
    assert watched.batches == (2 if which == "held_out" else 5) * (pass_ - 1) + 2
    train(tmp_path, config_of())
    assert_same_run(tmp_path, straight)


def test_the_held_out_are_not_trained_on(tmp_path: Path) -> None:
    """What they show changes nothing but the weights: with other pixels, the first epoch is the same."""

    @dataclasses.dataclass
    class Other:
        loader: EvalLoader

        @property
        def num_samples(self) -> int:
            return self.loader.num_samples

        def __iter__(self) -> Iterator[EvalBatch]:
            for batch in self.loader:
                yield EvalBatch(batch.images_BCHW.flip(0, 2), batch.labels_B)

    runs: list[list[Any]] = []
    for name in ("usual", "other"):
        data = tiny_data(config_of())
        assert data.held_out is not None
        given = data if name == "usual" else OpenData(data.train, data.val, Other(data.held_out))
        train(tmp_path / name, config_of(), data=given)
        records = read_records(tmp_path / name / "metrics.jsonl")
        runs.append(
            [[r["loss"] for r in records if r["epoch"] == e and r["kind"] == "epoch"] for e in (0, 1)]
        )
    assert runs[0][0] == runs[1][0]
    assert runs[0][1] != runs[1][1], "and the weights teach from the second epoch on"


def test_it_learns(tmp_path: Path) -> None:
    """24 images of noise, of which it sees another crop each time."""
    train(tmp_path, config_of(train={"epochs": 16, "eval_every": 16}, optim={"lr": 0.05}))
    records = [r for r in read_records(tmp_path / "metrics.jsonl") if r["kind"] == "epoch"]
    known = [sum(record["terms"][f"ce/peer{j}"] for j in (1, 2)) for record in records]
    assert known[-1] < 0.93 * known[0]
    assert records[-1]["terms"]["kd/peer1"] > 0


def test_a_network_that_is_sure_of_nonsense_is_left_out() -> None:
    state, data = build_state(config_of()), tiny_data(config_of())
    with torch.no_grad():
        for layer in state.network.classifiers[1].modules():
            if isinstance(layer, nn.Linear):
                layer.weight.mul_(1000)
    learn(state.objective, [observe(state, data.held_out)])
    weights = state.objective.memory["weights"]
    assert weights[0] > 0.9
    assert weights[1] < 0.1
    assert not state.network.training


def test_ranks_without_images_are_left_out() -> None:
    state, data = build_state(config_of()), tiny_data(config_of())
    whole = observe(state, data.held_out)
    assert whole.images == HELD
    first = learn(state.objective, [whole, Observed(0, None)])
    assert first == learn(state.objective, [Observed(0, None), whole])


def test_a_loader_that_hands_out_something_else_is_refused(tmp_path: Path) -> None:
    data = tiny_data(config_of())

    class Wrong:
        num_samples = HELD

        def __iter__(self) -> Iterator[EvalBatch]:
            assert data.held_out is not None
            for batch in data.held_out:
                yield EvalBatch(batch.images_BCHW, batch.labels_B + 5)

    with pytest.raises(DataError, match="the label 1"):
        train(tmp_path, config_of(), data=OpenData(data.train, data.val, Wrong()))


SMALL = ["cifar10-resnet32", "--model", "resnet8", "--device", "cpu", "--amp.dtype", "float32"]
SMALL += ["--data.subset", "48", "--train.batch-size", "8", "--train.epochs", "2"]


@pytest.mark.usefixtures("small_cifar")
def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.set_num_threads(1)
    run = tmp_path / "run"
    words = ["train", *SMALL, "--method", "kdcl", "--kdcl.target", "general", "--kdcl.num-peers", "2"]
    words += ["--run-dir", str(run)]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "--method kdcl --kdcl.target general: it learns from training images that are held out" in said
    assert "give --data.hold-out, as 1000" in said
    assert main([*words, "--data.hold-out", "48"]) == 2
    assert "--data.hold-out 48: of 48 training images; hold out fewer" in capsys.readouterr().err
    assert main([*words, "--data.hold-out", "8"]) == 0
    assert len(weights_of(run)) == 2
    assert read_records(run / "metrics.jsonl")[-1]["step"] == 2 * 5
    capsys.readouterr()
    assert main([*words, "--data.hold-out", "16"]) == 2
    assert "data.hold_out: 8 -> 16" in capsys.readouterr().err
    assert main(["config", *words[1:], "--data.hold-out", "8"]) == 0
