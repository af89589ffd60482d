"""The store keeps the newest two complete checkpoints; the lock keeps a folder for one holder."""

import errno
import hashlib
import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from pcl_fast.checkpoint import CheckpointStore, RunLock, is_intact, save_model
from pcl_fast.errors import ConfigError
from tests.tiny import assert_bitwise_equal, read_model


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


@pytest.fixture
def pair(tmp_path: Path) -> CheckpointStore:
    """Checkpoints of steps 7 and 8, both complete."""
    store = CheckpointStore(tmp_path)
    for step in (7, 8):
        store.save(content(step), step)
    return store


def flip(path: Path, offset: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1 << bit
    path.write_bytes(data)


def test_a_checkpoint_is_a_zip_file_whose_comment_is_the_digest_of_all_before_it(tmp_path: Path) -> None:
    saved = content(5)
    path = CheckpointStore(tmp_path).save(saved, 5)
    data = path.read_bytes()
    expected = b"sha256:" + hashlib.sha256(data[:-71]).hexdigest().encode()
    assert data.endswith(expected)
    with zipfile.ZipFile(path) as archive:
        assert archive.comment == expected
        assert archive.testzip() is None
    for mmap in (False, True):
        assert_bitwise_equal(torch.load(path, weights_only=True, mmap=mmap), saved)


def test_every_flipped_missing_or_added_byte_is_noticed(tmp_path: Path) -> None:
    """All bits of a small file; all lengths it can be cut to; and what is put behind it."""
    path = CheckpointStore(tmp_path).save({"progress": {}, "state": {"weights": torch.arange(7)}}, 1)
    whole = path.read_bytes()
    assert is_intact(path)
    with path.open("r+b", buffering=0) as file:
        for offset, byte in enumerate(whole):
            for changed in (byte ^ (1 << offset % 8), byte ^ 0xFF):
                os.pwrite(file.fileno(), bytes([changed]), offset)
                assert not is_intact(path), f"byte {offset}: {changed} instead of {byte}"
            os.pwrite(file.fileno(), bytes([byte]), offset)
        assert is_intact(path)
        for added in (b"\0", whole, whole[-71:]):
            path.write_bytes(whole + added)
            assert not is_intact(path)
        path.write_bytes(whole)
        for length in reversed(range(len(whole))):
            file.truncate(length)
            assert not is_intact(path), f"cut to {length} of {len(whole)} bytes"


@pytest.mark.parametrize("part", ["first", "weights", "directory", "end record", "digest"])
def test_damage_in_every_region_leads_to_the_checkpoint_before(pair: CheckpointStore, part: str) -> None:
    seven, eight = pair.paths()
    data, expected = eight.read_bytes(), torch.load(seven, weights_only=True)
    offsets = {
        "first": 0,
        "weights": len(data) // 2,
        "directory": data.index(b"PK\x01\x02") + 12,  # the time of a file
        "end record": data.rindex(b"PK\x05\x06"),
        "digest": len(data) - 1,
    }
    flip(eight, offsets[part])
    warnings: list[str] = []
    assert_bitwise_equal(pair.load_newest(warnings.append), expected)
    assert len(warnings) == 1
    assert (
        "step-00000008.pt (its checksum is wrong or missing); going on from step-00000007.pt" in warnings[0]
    )
    assert "\n" not in warnings[0]


def test_only_who_goes_on_training_sets_a_damaged_one_aside(pair: CheckpointStore) -> None:
    seven, eight = pair.paths()
    flip(eight, 3000)
    damaged, warnings = eight.read_bytes(), list[str]()
    for _ in range(2):
        pair.load_newest(warnings.append)
        assert names(pair) == [seven.name, eight.name]
    assert len(warnings) == 2
    pair.load_newest(warnings.append, set_aside=True)
    assert len(warnings) == 3
    assert names(pair) == [seven.name, f"{eight.name}.damaged"]
    assert (pair.folder / f"{eight.name}.damaged").read_bytes() == damaged
    saved = pair.load_newest(no_warning, set_aside=True)
    assert saved is not None
    assert saved["progress"]["steps_done"] == 7


def test_if_none_is_whole_all_stay_where_they_are(pair: CheckpointStore) -> None:
    """So that the same command does not begin anew when it is given again."""
    for path in pair.paths():
        flip(path, 3000)
    for _ in range(2):
        with pytest.raises(ConfigError, match="no checkpoint can be read"):
            pair.load_newest(no_warning, set_aside=True)
    assert names(pair) == ["step-00000007.pt", "step-00000008.pt"]


def test_what_the_disk_cannot_read_now_is_not_called_damaged(
    pair: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    seven, eight = pair.paths()
    open_ = Path.open

    def failing(path: Path, mode: str = "r", **options: Any) -> Any:
        if path == eight and mode == "rb":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return open_(path, mode, **options)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", failing)
        warnings: list[str] = []
        saved = pair.load_newest(warnings.append, set_aside=True)
        assert saved is not None
        assert saved["progress"]["steps_done"] == 7
        assert "step-00000008.pt (OSError)" in warnings[0]
        pair.save(content(9), 9)
        assert names(pair) == [seven.name, eight.name, "step-00000009.pt"], "two are known to be whole"
    pair.save(content(10), 10)
    assert names(pair) == ["step-00000009.pt", "step-00000010.pt"]


def test_what_a_training_drops_while_it_is_read_is_looked_for_anew(pair: CheckpointStore) -> None:
    class Overtaken(CheckpointStore):
        """Between listing and reading, the training saves twice."""

        def paths(self) -> list[Path]:
            listed = super().paths()
            if listed[-1].name == "step-00000008.pt":
                for step in (9, 10):
                    pair.save(content(step), step)
            return listed

    saved = Overtaken(pair.folder.parent).load_newest(no_warning)
    assert saved is not None
    assert saved["progress"]["steps_done"] == 10


class Payload:
    """Unpickled, it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_a_right_checksum_opens_no_door(pair: CheckpointStore, tmp_path: Path) -> None:
    """Anybody can compute one: what is unpickled is plain, and a checkpoint of a run, or refused."""
    crime = tmp_path / "crime"
    other = CheckpointStore(tmp_path / "other")
    evil = other.save(content(9) | {"state": Payload(crime)}, 9)
    foreign = other.save({"model": torch.ones(3)}, 10)
    for path in (evil, foreign):
        assert is_intact(path)
        path.rename(pair.folder / path.name)
    warnings: list[str] = []
    saved = pair.load_newest(warnings.append, set_aside=True)
    assert saved is not None
    assert saved["progress"]["steps_done"] == 8
    (warning,) = warnings
    assert "step-00000009.pt (it holds more than plain values and tensors)" in warning
    assert "step-00000010.pt (it is not a checkpoint of a run)" in warning
    assert "\n" not in warning
    assert not crime.exists()
    aside = [f"step-{step:08d}.pt.damaged" for step in (9, 10)]
    assert [name for name in names(pair) if name.endswith(".damaged")] == aside


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
