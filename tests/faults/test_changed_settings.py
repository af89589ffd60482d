"""A run folder belongs to one run and to one process."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pcl_fast.errors import ConfigError
from tests.conftest import REPOSITORY
from tests.tiny import Watcher, assert_same_run, tiny_config, train

HOLD_FOLDER = """
import sys, time
from pathlib import Path
from pcl_fast.checkpoint import RunLock

lock = RunLock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(50)
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("finished") / "run"
    train(path)
    return path


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"train": {"epochs": 3}}, "train.epochs: 2 -> 3"),
        ({"pcl": {"temperature": 2.0}}, "pcl.temperature: 3.0 -> 2.0"),
        ({"optim": {"milestones": (0.5,)}}, "optim.milestones: [0.5, 0.75] -> [0.5]"),
        ({"seed": 7}, "seed: 0 -> 7"),
        ({"method": "vanilla"}, "method: pcl -> vanilla"),
    ],
)
def test_changed_settings_are_refused_with_the_difference(
    finished: Path, changes: dict[str, Any], line: str
) -> None:
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match="holds a run with other settings") as error:
        train(finished, tiny_config(**changes))
    assert error.value.exit_code == 2
    assert line in str(error.value).splitlines()[-1]
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before


def test_all_differences_are_listed(finished: Path) -> None:
    with pytest.raises(ConfigError) as error:
        train(finished, tiny_config(seed=7, optim={"lr": 0.2}, train={"log_every": 1}))
    listed = [line.strip() for line in str(error.value).splitlines()[1:]]
    assert listed == ["optim.lr: 0.1 -> 0.2", "seed: 0 -> 7"], "log_every is free"


def test_free_settings_may_change_on_resume(finished: Path) -> None:
    """A finished run has nothing more to do under any of them."""
    watcher = Watcher()
    changes = {"train": {"log_every": 1, "save_every": 2, "eval_batch_size": 5}, "data": {"root": Path("x")}}
    train(finished, tiny_config(**changes), [watcher])
    assert watcher.steps == []
    assert watcher.info is not None
    assert watcher.info.first_step == 8


def test_not_resuming_moves_the_run_aside_whole(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(run)
    for seed in (1, 2):
        train(run, tiny_config(resume=False, seed=seed))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "run.1", "run.2"]
    assert_same_run(tmp_path / "run.1", finished)
    train(tmp_path / "seed1", tiny_config(seed=1))
    assert_same_run(tmp_path / "run.2", tmp_path / "seed1")


def test_a_second_process_is_refused_naming_the_first(tmp_path: Path) -> None:
    run = tmp_path / "run"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", HOLD_FOLDER, str(run)]
    holder = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        for resume in (True, False):
            with pytest.raises(ConfigError) as error:
                train(run, tiny_config(resume=resume))
            assert f"in use by process {holder.pid} on {socket.gethostname()};" in str(error.value)
            assert error.value.exit_code == 2
        assert not (run / "metrics.jsonl").exists()
        holder.kill()
        holder.wait(timeout=10)
        waited = time.monotonic()
        train(run)  # a dead holder holds nothing
        assert time.monotonic() - waited < 30
    finally:
        holder.kill()
        holder.wait()
        if holder.stdout:
            holder.stdout.close()


def test_leftovers_of_a_killed_save_are_cleared_on_resume(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    leftovers = [
        run / ".model.safetensors.0a1b2c3d.part",
        run / "checkpoints" / ".step-00000004.pt.00000000.part",
    ]
    for path in leftovers:
        path.write_bytes(b"half")
    (run / "notes.part").write_text("a user's own file")
    train(run)
    assert not any(path.exists() for path in leftovers)
    assert (run / "notes.part").exists()
