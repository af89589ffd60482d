"""A run's folder, and the configuration that lies in it."""

import dataclasses
import json
from pathlib import Path

import pytest

from pcl_fast.checkpoint import RunLock
from pcl_fast.errors import ConfigError
from pcl_fast.run_folder import FREE_SETTINGS, RunFolder
from tests.tiny import tiny_config


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A folder that a run has been in."""
    folder = RunFolder(tmp_path / "run")
    folder.claim(tiny_config()).close()
    return folder


def test_the_configuration_is_read_back_as_it_was(folder: RunFolder) -> None:
    config = tiny_config(data={"root": Path("some/where")}, optim={"milestones": (0.25, 0.5)}, split="stage2")
    other = RunFolder(folder.path / "inner")
    other.claim(config).close()
    assert other.read_config() == config


def test_claiming_twice_is_refused_until_it_is_closed(folder: RunFolder) -> None:
    lock = folder.claim(tiny_config())
    with pytest.raises(ConfigError, match="in use by process"):
        folder.claim(tiny_config())
    lock.close()
    folder.claim(tiny_config()).close()


def test_a_refused_claim_holds_nothing(folder: RunFolder) -> None:
    with pytest.raises(ConfigError, match="other settings"):
        folder.claim(tiny_config(seed=3))
    folder.claim(tiny_config()).close()


def test_every_free_setting_exists_and_may_change(folder: RunFolder) -> None:
    changes = {
        "run_dir": Path("x"),
        "resume": True,
        "device": "cpu",
        "capture": "on",
        "data.root": Path("y"),
        "data.train": Path("t"),
        "data.val": Path("v"),
        "data.workers": 3,
        "train.log_every": 7,
        "train.save_every": 7,
        "train.save_seconds": 0.5,
        "train.save_steps": 7,
        "dist.timeout": 7.0,
        "train.eval_batch_size": 7,
    }
    assert changes.keys() == FREE_SETTINGS
    config = tiny_config()
    for key, value in changes.items():
        room, _, name = key.rpartition(".")
        inner = dataclasses.replace(getattr(config, room) if room else config, **{name: value})
        changed = dataclasses.replace(config, **{room: inner}) if room else inner
        folder.claim(changed).close()
        assert folder.read_config() == changed


def test_no_run_is_said_to_be_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no run here .*config\.json is missing"):
        RunFolder(tmp_path).read_config()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ("3", "cannot be read"),
        ('{"sed": 1}', "unknown key 'sed'. Did you mean 'seed'?"),
        ('{"train": {"epoch": 1}}', "train: unknown key 'epoch'. Did you mean 'epochs'?"),
        ('{"seed": -1}', "--seed -1"),
    ],
)
def test_a_damaged_configuration_is_a_message(folder: RunFolder, content: str, message: str) -> None:
    folder.config.write_text(content)
    with pytest.raises(ConfigError) as error:
        folder.read_config()
    assert message in str(error.value)


def test_a_folder_in_use_is_not_moved_aside(folder: RunFolder) -> None:
    lock = RunLock(folder.path)
    with pytest.raises(ConfigError, match="in use"):
        folder.claim(tiny_config(resume=False))
    lock.close()
    assert json.loads(folder.config.read_text())["resume"] is True
    assert [path.name for path in folder.path.parent.iterdir()] == ["run"]


def test_moving_aside_never_overwrites(folder: RunFolder) -> None:
    parent = folder.path.parent
    (parent / "run.1").mkdir()
    (parent / "run.1" / "mine").write_text("kept")
    folder.claim(tiny_config(resume=False, seed=4)).close()
    assert (parent / "run.1" / "mine").read_text() == "kept"
    assert RunFolder(parent / "run.2").read_config().seed == 0
    assert folder.read_config().seed == 4
    assert not RunFolder(parent / "run.3").path.exists()
