"""A checkpoint is complete or absent; one that was damaged later is noticed, and the one before is used."""

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from pcl_fast.checkpoint import CheckpointStore
from pcl_fast.errors import ConfigError
from tests.tiny import Watcher, assert_bitwise_equal, assert_same_run, train


def content(step: int) -> dict[str, Any]:
    return {"progress": {"steps_done": step}, "state": {"weights": torch.arange(1000) + step}}


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    """Two checkpoints, of steps 1 and 2."""
    store = CheckpointStore(tmp_path)
    store.save(content(1), 1)
    store.save(content(2), 2)
    return store


@pytest.mark.parametrize("cut", [0, 1, 100, -100, -1])
def test_the_newest_one_cut_is_passed_over_with_both_named(store: CheckpointStore, cut: int) -> None:
    newest = store.paths()[-1]
    newest.write_bytes(newest.read_bytes()[:cut])
    warnings: list[str] = []
    saved = store.load_newest(warnings.append)
    assert_bitwise_equal(saved, content(1))
    assert len(warnings) == 1
    assert "step-00000002.pt" in warnings[0]
    assert "step-00000001.pt" in warnings[0]


def test_every_flipped_byte_of_the_weights_is_noticed(store: CheckpointStore) -> None:
    newest = store.paths()[-1]
    whole = newest.read_bytes()
    weights = content(2)["state"]["weights"].numpy().tobytes()
    begin = whole.index(weights)
    for offset in range(begin, begin + len(weights), 397):
        damaged = bytearray(whole)
        damaged[offset] ^= 1
        newest.write_bytes(damaged)
        warnings: list[str] = []
        assert_bitwise_equal(store.load_newest(warnings.append), content(1))
        assert warnings


def test_if_all_are_damaged_the_run_is_refused_not_begun_anew(store: CheckpointStore) -> None:
    for path in store.paths():
        path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ConfigError, match=r"no checkpoint can be read: step-0+2\.pt .*step-0+1\.pt") as error:
        store.load_newest(print)
    assert error.value.exit_code == 2


class Payload:
    """Unpickled, it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("form", ["torch", "pickle", "zipped pickle"])
def test_a_malicious_checkpoint_is_refused_and_does_nothing(tmp_path: Path, form: str) -> None:
    store, crime = CheckpointStore(tmp_path), tmp_path / "crime"
    store.save(content(1), 1)
    path = store.folder / "step-00000002.pt"
    evil = {"progress": {}, "state": Payload(crime)}
    if form == "torch":
        torch.save(evil, path)
    elif form == "pickle":
        path.write_bytes(pickle.dumps(evil))
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(evil, protocol=2))
            archive.writestr("archive/version", "3\n")
    warnings: list[str] = []
    assert_bitwise_equal(store.load_newest(warnings.append), content(1))
    assert len(warnings) == 1
    assert "step-00000002.pt" in warnings[0]
    assert not crime.exists()
    pickle.loads(pickle.dumps(evil))  # it would have been dangerous
    assert crime.exists()


@pytest.mark.parametrize("foreign", [{"model": {}}, [1, 2], torch.zeros(3)], ids=["dict", "list", "tensor"])
def test_a_checkpoint_of_another_program_is_refused(tmp_path: Path, foreign: Any) -> None:
    store = CheckpointStore(tmp_path)
    store.folder.mkdir()
    torch.save(foreign, store.folder / "step-00000009.pt")
    with pytest.raises(ConfigError, match="no checkpoint can be read"):
        store.load_newest(print)


def test_a_run_goes_on_from_the_one_before_and_ends_the_same(straight: Path, tmp_path: Path) -> None:
    """The whole way: two epochs done, the second checkpoint cut, the same command again."""
    run = tmp_path / "run"
    train(run)
    newest = max((run / "checkpoints").iterdir())
    newest.write_bytes(newest.read_bytes()[:-2000])
    watcher = Watcher()
    train(run, sinks=[watcher])
    assert watcher.info is not None
    assert watcher.info.first_step == 4
    assert len(watcher.messages) == 1
    assert "step-00000008.pt" in watcher.messages[0]
    assert "step-00000004.pt" in watcher.messages[0]
    assert_same_run(run, straight)
