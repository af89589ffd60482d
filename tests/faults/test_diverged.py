"""A loss that is no number stops training before it reaches the weights, and is named."""

import dataclasses
from pathlib import Path

import pytest
import torch

from pcl_fast.errors import DivergedError, Preempted
from pcl_fast.run_folder import RunFolder
from pcl_fast.trainer import Trainer
from tests.tiny import (
    Damaging,
    SignalAtStep,
    assert_bitwise_equal,
    newest_checkpoint,
    tiny_config,
    tiny_data,
    train,
)


def test_a_nan_in_one_view_names_step_peer_and_term(tmp_path: Path) -> None:
    """Peer 2 sees it; peer 1, which sees another view, is hit by what peer 2 teaches only."""
    data = tiny_data(tiny_config())
    damaged = dataclasses.replace(data, train=Damaging(data.train, epoch_number=1, step=2, view=1))
    with pytest.raises(DivergedError) as error:
        train(tmp_path / "run", data=damaged)
    assert error.value.exit_code == 4
    message = str(error.value)
    assert message.startswith("step 6: not finite: ")
    assert "ce/peer2" in message
    assert "pm/peer1" in message
    assert "ce/peer1" not in message
    assert f"last checkpoint is {tmp_path / 'run' / 'checkpoints' / 'step-00000004.pt'}" in message


def test_the_files_stay_those_of_the_last_good_save_and_the_run_can_go_on(
    straight: Path, tmp_path: Path
) -> None:
    run, data = tmp_path / "run", tiny_data(tiny_config())
    with pytest.raises(Preempted):
        train(run, sinks=[SignalAtStep(5)])
    files = [*(run / "checkpoints").iterdir(), run / "model.safetensors"]
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}
    assert len(before) == 3
    damaged = dataclasses.replace(data, train=Damaging(data.train, epoch_number=1, step=3, view=0))
    with pytest.raises(DivergedError, match="step 7"):
        train(run, data=damaged)
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files} == before
    assert sorted((run / "checkpoints").iterdir()) == sorted(files[:2])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_momentum_and_mean_teachers_are_those_before_the_step(tmp_path: Path, value: float) -> None:
    """In memory, too: equal, bit for bit, to those of a run stopped one step earlier."""
    config = tiny_config()
    with pytest.raises(Preempted):
        train(tmp_path / "stopped", config, [SignalAtStep(5)])
    expected = newest_checkpoint(tmp_path / "stopped")["state"]

    data = tiny_data(config)
    damaged = dataclasses.replace(data, train=Damaging(data.train, 1, 2, 0, value))
    folder = RunFolder(tmp_path / "run")
    trainer = Trainer(config, damaged, folder, [])
    with pytest.raises(DivergedError, match="step 6"):
        trainer.run()
    state = trainer.state
    assert state.mean_teacher is not None
    for network, name in ((state.network, "network"), (state.mean_teacher.network, "mean_teacher")):
        parameters = {key: value.detach() for key, value in network.named_parameters()}
        assert_bitwise_equal(parameters, {key: expected[name][key] for key in parameters})
        assert all(torch.isfinite(parameter).all() for parameter in parameters.values())
    assert_bitwise_equal(state.state_dict()["momentum"], expected["momentum"])


def test_the_last_record_is_of_a_step_before(tmp_path: Path) -> None:
    config = tiny_config(train={"log_every": 1})
    data = tiny_data(config)
    damaged = dataclasses.replace(data, train=Damaging(data.train, 0, 3, 0))
    with pytest.raises(DivergedError, match="There is no checkpoint yet"):
        train(tmp_path / "run", config, data=damaged)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 2
    assert "NaN" not in "".join(lines)
