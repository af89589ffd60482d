"""`--deterministic`: two runs of it are the same, to the bit, and what is not deterministic is refused."""

from pathlib import Path

import pytest
import torch

from pcl_fast.run_folder import RunFolder
from tests.dist.training import codes, run, said, training, write_photos
from tests.tiny import Watcher, assert_same_run, tiny_config, train


class Switch(Watcher):
    """Notes in each step whether torch would refuse a kernel that is not deterministic."""

    def __init__(self) -> None:
        super().__init__()
        self.states: set[bool] = set()

    def stepped(self, step: int) -> None:
        self.states.add(torch.are_deterministic_algorithms_enabled())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_runs_are_the_same(tmp_path: Path, dtype: str) -> None:
    config, switch = tiny_config(deterministic=True, amp={"dtype": dtype}), Switch()
    for name in ("one", "other"):
        train(tmp_path / name, config, [switch])
    assert switch.states == {True}
    assert_same_run(tmp_path / "one", tmp_path / "other")


def test_two_runs_of_two_ranks_are_the_same(tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos")
    for name in ("one", "other"):
        outcomes = run(tmp_path / "ranks", training(photos, tmp_path / name, "--deterministic"))
        assert codes(outcomes) == [0, 0], said(outcomes)
        assert RunFolder(tmp_path / name).read_config().deterministic
    assert_same_run(tmp_path / "one", tmp_path / "other")
