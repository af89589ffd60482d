"""The store keeps the newest two complete checkpoints; the lock keeps a folder for one holder."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from pcl_fast.checkpoint import CheckpointStore, RunLock, save_model
from pcl_fast.errors import ConfigError
from tests.tiny import assert_bitwise_equal, files_limited_to, read_model


def content(step: int) -> dict[str, Any]:
    """Every kind of value that a checkpoint holds, some tens of kilobytes."""
    return {
        "progress": {"steps_done": step, "accuracies": {"peer1": {"top1": 12.5}}, "recent": {"samples": 3}},
        "state": {
            "weights": torch.randn(100, 100),
            "half": torch.randn(7).bfloat16(),
            "mean_teacher": None,
            "param_groups": [{"lr": 0.1, "params": [0, 1], "nesterov": True}],
            "rng": torch.get_rng_state(),
        },
    }


def no_warning(message: str) -> None:
    pytest.fail(message)


def names(store: CheckpointStore) -> list[str]:
    return sorted(path.name for path in store.folder.iterdir())


def test_what_is_saved_is_loaded_in_the_same_bits(tmp_path: Path) -> None:
    store, saved = CheckpointStore(tmp_path), content(5)
    assert store.save(saved, 5) == tmp_path / "checkpoints" / "step-00000005.pt"
    assert_bitwise_equal(CheckpointStore(tmp_path).load_newest(no_warning), saved)


def test_an_empty_folder_has_no_checkpoint(tmp_path: Path) -> None:
    assert CheckpointStore(tmp_path).load_newest(no_warning) is None
    assert CheckpointStore(tmp_path).paths() == []


def test_the_newest_is_by_step_and_the_newest_two_stay(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    for step in (99, 100, 1_000_000):
        store.save(content(step), step)
    assert names(store) == ["step-00000100.pt", "step-01000000.pt"]
    saved = store.load_newest(no_warning)
    assert saved is not None
    assert saved["progress"]["steps_done"] == 1_000_000


def test_saving_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    """As after a stop at the end of an epoch, when the epoch is then closed."""
    store, last = CheckpointStore(tmp_path), content(3)
    for saved, step in ((content(2), 2), (content(3), 3), (last, 3)):
        store.save(saved, step)
    assert names(store) == ["step-00000002.pt", "step-00000003.pt"]
    assert_bitwise_equal(store.load_newest(no_warning), last)


def test_there_are_never_fewer_than_two_once_there_were_two(tmp_path: Path) -> None:
    """A random history of saves, full disks and cut files."""
    draws, store = random.Random(3), CheckpointStore(tmp_path)
    complete: list[int] = []
    for step in range(1, 60):
        if draws.random() < 0.4:
            with files_limited_to(draws.randrange(20_000)), pytest.raises(OSError, match="File too large"):
                store.save(content(step), step)
        else:
            store.save(content(step), step)
            complete.append(step)
        assert names(store) == [f"step-{kept:08d}.pt" for kept in complete[-2:]]
        if complete:
            saved = store.load_newest(no_warning)
            assert saved is not None
            assert saved["progress"]["steps_done"] == complete[-1]
    assert len(complete) > 20


def test_the_deployable_network_is_plain_float32_with_a_description(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    save_model(tmp_path / "model.safetensors", network.state_dict(), {"model": "x", "steps": "3"})
    loaded = load_file(tmp_path / "model.safetensors")
    assert_bitwise_equal(dict(sorted(loaded.items())), dict(sorted(network.state_dict().items())))
    assert read_model(tmp_path / "model.safetensors")["about"] == {"model": "x", "steps": "3"}


def test_a_folder_is_held_by_one_at_a_time(tmp_path: Path) -> None:
    first = RunLock(tmp_path / "run")
    with pytest.raises(ConfigError, match="in use by process"):
        RunLock(tmp_path / "run")
    first.close()
    second = RunLock(tmp_path / "run")
    other = RunLock(tmp_path / "another")
    second.close()
    other.close()
