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
        act(max(self.complete | self.damaged, default=0) + self.draws.randrange(3))
        for step in self.complete:
            saved = torch.load(self.path(step), weights_only=True)
            assert saved["progress"]["steps_done"] == step
        assert not list(self.store.folder.glob(".*")), "nothing half-written lies about"

    def save(self, step: int) -> None:
        self.store.save(content(step), step)
        self.damaged.discard(step)
        self.complete = set(sorted(self.complete | {step})[-2:])

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
