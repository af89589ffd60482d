"""Whatever saves fail and whatever is damaged: the newest two complete checkpoints stay."""

import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from pcl_fast.checkpoint import CheckpointStore
from pcl_fast.errors import ConfigError
from tests.tiny import files_limited_to


def content(step: int) -> dict[str, Any]:
    return {"progress": {"steps_done": step}, "state": {"weights": torch.arange(5000) + step}}


def test_steps_are_numbers_not_words(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    for step in (99_999_998, 99_999_999, 100_000_000):
        store.save(content(step), step)
    assert [path.name for path in store.paths()] == ["step-99999999.pt", "step-100000000.pt"]
    saved = store.load_newest(pytest.fail)
    assert saved is not None
    assert saved["progress"]["steps_done"] == 100_000_000


def test_what_is_not_ours_is_neither_read_nor_dropped(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    store.folder.mkdir()
    foreign = ["step-xyz.pt", "step-1.pt", "step-00000001.pt.damaged", "notes.txt", "step-00000001.pth"]
    for name in foreign:
        (store.folder / name).write_text("mine")
    (store.folder / "step-00000099.pt").mkdir()
    (store.folder / "step-00000098.pt").symlink_to("nowhere")
    assert store.load_newest(pytest.fail) is None
    for step in range(1, 5):
        store.save(content(step), step)
        saved = store.load_newest(pytest.fail, set_aside=True)
        assert saved is not None
        assert saved["progress"]["steps_done"] == step
    kept = ["step-00000003.pt", "step-00000004.pt", "step-00000098.pt", "step-00000099.pt"]
    assert sorted(path.name for path in store.folder.iterdir()) == sorted(foreign + kept)
    assert {(store.folder / name).read_text() for name in foreign} == {"mine"}


def test_what_was_just_written_stays_though_newer_ones_lie_there(tmp_path: Path) -> None:
    """As after a start that could not read the newest ones, and went on from an older one."""
    store = CheckpointStore(tmp_path)
    kept = {7: [7], 8: [7, 8], 3: [3, 8], 4: [4, 8]}
    for step, steps in kept.items():
        store.save(content(step), step)
        assert [int(path.stem[5:]) for path in store.paths()] == steps


class History:
    """Random saves, full disks, damage and loads in one folder, and what must be there after each."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.store, self.draws = CheckpointStore(folder), random.Random(seed)
        self.complete: set[int] = set()
        self.damaged: set[int] = set()

    def path(self, step: int) -> Path:
        return self.store.folder / f"step-{step:08d}.pt"

    def act(self) -> None:
        """One event; `complete` becomes what the store promises to have kept."""
        act = self.draws.choice([self.save, self.save, self.save, self.fail, self.damage, self.load])
        act(max(0, max(self.complete | self.damaged, default=0) + self.draws.randrange(-1, 3)))
        for step in self.complete:
            saved = torch.load(self.path(step), weights_only=True)
            assert saved["progress"]["steps_done"] == step
        assert not list(self.store.folder.glob(".*")), "nothing half-written lies about"

    def save(self, step: int) -> None:
        self.store.save(content(step), step)
        self.damaged.discard(step)
        self.complete = {step, *sorted(self.complete - {step})[-1:]}

    def fail(self, step: int) -> None:
        with files_limited_to(self.draws.randrange(40_000)), pytest.raises(OSError, match="File too large"):
            self.store.save(content(step), step)

    def damage(self, _: int) -> None:
        if self.complete:
            step = self.draws.choice(sorted(self.complete))
            size = self.path(step).stat().st_size
            if self.draws.random() < 0.5:
                self.flip(self.path(step), self.draws.randrange(size))
            else:
                os.truncate(self.path(step), self.draws.randrange(size))
            self.complete.remove(step)
            self.damaged.add(step)

    def flip(self, path: Path, offset: int) -> None:
        data = bytearray(path.read_bytes())
        data[offset] ^= 1 << self.draws.randrange(8)
        path.write_bytes(data)

    def load(self, _: int) -> None:
        aside = self.draws.random() < 0.5
        try:
            saved = self.store.load_newest(lambda _: None, set_aside=aside)
        except ConfigError:
            assert not self.complete
            return
        assert (saved["progress"]["steps_done"] if saved else None) == max(self.complete, default=None)
        if aside:
            self.damaged -= {step for step in self.damaged if not self.path(step).exists()}


@pytest.mark.parametrize("seed", range(8))
def test_there_are_never_fewer_than_two_once_there_were_two(tmp_path: Path, seed: int) -> None:
    """The newest two complete ones outlive whatever happens, but for the disk itself damaging them."""
    history = History(tmp_path, seed)
    for _ in range(40):
        history.act()
