"""A save in the background has what was there when it was asked for, and every failure is heard of."""

import errno
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pcl_fast.checkpoint import CheckpointStore
from pcl_fast.saver import Saver
from tests.conftest import REPOSITORY
from tests.tiny import assert_bitwise_equal, files_limited_to, read_model

ABOUT = {"model": "x", "steps": "3"}

EXITS = """
import os, sys, time
from pathlib import Path
import torch
from pcl_fast.checkpoint import CheckpointStore
from pcl_fast.saver import Saver

class Slow(CheckpointStore):
    def save(self, content, step):
        time.sleep(0.3)
        return super().save(content, step)

def leave(run, way):
    saver = Saver(Slow(run), run / "model.safetensors")
    saver.save({"progress": {}, "state": {"w": torch.ones(3)}}, 1, {"w": torch.ones(3)}, {})
    assert not list(run.glob("checkpoints/*"))
    if way == "exit":
        sys.exit(0)
    if way == "raise":
        raise SystemError("on purpose")

for way, code in {"end": 0, "exit": 0, "raise": 1}.items():
    child = os.fork()
    if not child:
        leave(Path(sys.argv[1]) / way, way)
        break
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == code, way
"""


class Gated(CheckpointStore):
    """Saves when it is let to, and notes what it does."""

    def __init__(self, run_dir: Path) -> None:
        super().__init__(run_dir)
        self.gate, self.done = threading.Event(), list[int]()

    def save(self, content: dict[str, Any], step: int) -> Path:
        assert self.gate.wait(20)
        path = super().save(content, step)
        self.done.append(step)
        return path


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Gated]:
    """Closed at first."""
    store = Gated(tmp_path)
    yield store
    store.gate.set()


@pytest.fixture
def saver(store: Gated) -> Saver:
    return Saver(store, store.folder.parent / "model.safetensors")


def content(step: int) -> dict[str, Any]:
    return {"progress": {"steps_done": step}, "state": {"weights": torch.arange(20_000) + step}}


def save(saver: Saver, step: int) -> None:
    saver.save(content(step), step, {"weights": torch.full((20_000,), float(step))}, {"steps": str(step)})


def steps(saver: Saver) -> list[int]:
    return [int(path.stem[5:]) for path in saver.checkpoints.paths()]


def rich_content(device: str) -> tuple[dict[str, Any], list[Tensor]]:
    """Every kind of value, in all kinds of memory; and the memory itself."""
    arena = torch.randn(4000, device=device)
    image = torch.randn(2, 3, 5, 7, device=device).to(memory_format=torch.channels_last)
    weight = torch.nn.Parameter(torch.randn(6, device=device))
    half = torch.randn(9, device=device).bfloat16()
    state = {
        "views of one memory": [arena[:1000].view(10, 100), arena[3000:], arena[::7], arena[5]],
        "image": image,
        "nested": ({"weight": weight}, [half, None]),
        "expanded": arena[:1].expand(5),
        "empty": torch.empty(0, device=device),
        "rng": torch.get_rng_state(),
    }
    progress = {"steps_done": 3, "rate": 0.1, "name": "x", "accuracies": {"peer1": {"top1": 12.5}}}
    return {"progress": progress, "state": state}, [arena, image, weight, half]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_what_changes_in_place_after_the_call_is_saved_as_it_was(
    saver: Saver, store: Gated, device: str
) -> None:
    saved, memory = rich_content(device)
    CheckpointStore(store.folder.parent / "straight").save(saved, 3)
    deployed = {"weight": memory[2], "image": memory[1]}
    kept = {name: tensor.detach().cpu().clone() for name, tensor in deployed.items()}

    saver.save(saved, 3, deployed, ABOUT)
    with torch.no_grad():
        for tensor in memory:
            tensor.mul_(-2).add_(1)
    saved["progress"]["accuracies"]["peer1"]["top1"] = 99.0
    saved["state"]["views of one memory"].clear()
    deployed.clear()
    store.gate.set()
    saver.wait()

    straight = torch.load(store.folder.parent / "straight/checkpoints/step-00000003.pt", "cpu")
    assert_bitwise_equal(store.load_newest(pytest.fail), straight)
    assert_bitwise_equal(read_model(saver.model), {"tensors": dict(sorted(kept.items())), "about": ABOUT})


def test_only_what_is_seen_of_a_memory_is_written(saver: Saver, store: Gated) -> None:
    """A view of an arena is saved without the arena."""
    store.gate.set()
    saver.save({"progress": {}, "state": torch.zeros(1_000_000)[:10]}, 1, {}, {})
    saver.wait()
    assert store.paths()[0].stat().st_size < 10_000


def test_save_returns_before_anything_is_written_and_wait_when_all_is(saver: Saver, store: Gated) -> None:
    save(saver, 1)
    assert steps(saver) == []
    assert saver.failure() is None, "and does not wait"
    store.gate.set()
    saver.wait()
    assert steps(saver) == [1]
    assert read_model(saver.model)["about"] == {"steps": "1"}
    saver.wait()
    assert saver.close() is None


def test_one_save_at_a_time_and_each_of_them(saver: Saver, store: Gated) -> None:
    save(saver, 1)
    opener = threading.Timer(0.1, store.gate.set)
    opener.start()
    save(saver, 2)
    assert store.done[:1] == [1], "the second call waited for the first save"
    for step in (3, 4):
        save(saver, step)
    assert saver.close() is None
    opener.join()
    assert store.done == [1, 2, 3, 4]
    assert steps(saver) == [3, 4]


@pytest.mark.parametrize("limit", [0, 100, 50_000, 90_000], ids=["all", "model", "model's end", "checkpoint"])
def test_a_full_disk_is_told_once_and_the_next_save_works(saver: Saver, store: Gated, limit: int) -> None:
    """The model takes 80 kilobytes, the checkpoint 160."""
    store.gate.set()
    save(saver, 1)
    saver.wait()
    before = store.paths()[0].read_bytes()
    with files_limited_to(limit):
        save(saver, 2)
        with pytest.raises(OSError, match="File too large") as raised:
            saver.wait()
        assert raised.value.errno == errno.EFBIG
        assert saver.failure() is None, "told already"
        save(saver, 2)
        assert isinstance(saver.close(), OSError)
        assert saver.failure() is None
    assert steps(saver) == [1]
    assert store.paths()[0].read_bytes() == before
    assert list(store.folder.parent.rglob(".*.part")) == []
    save(saver, 3)
    saver.wait()
    assert saver.failure() is None
    assert steps(saver) == [1, 3]
    assert read_model(saver.model)["about"] == {"steps": "3"}


def test_a_failure_that_nobody_asked_for_is_not_forgotten(saver: Saver, store: Gated) -> None:
    store.gate.set()
    with files_limited_to(0):
        save(saver, 1)
        assert saver._thread is not None
        saver._thread.join()
    save(saver, 2)
    saver.wait()  # the last save worked
    assert isinstance(saver.failure(), OSError)
    assert saver.failure() is None
    assert steps(saver) == [2]


def test_wait_never_returns_over_a_save_that_failed(saver: Saver, store: Gated) -> None:
    store.gate.set()
    with files_limited_to(0):
        save(saver, 1)
        assert saver.close() is not None
    with pytest.raises(OSError, match="File too large"):
        saver.wait()


@pytest.mark.parametrize("call", ["save", "failure", "wait", "close"])
def test_a_defect_in_the_thread_is_raised_at_the_next_call(saver: Saver, store: Gated, call: str) -> None:
    store.gate.set()
    saver.save({"progress": {}, "state": lambda: None}, 1, {}, {})
    assert saver._thread is not None
    saver._thread.join()
    calls = {
        "save": lambda: save(saver, 2),
        "failure": saver.failure,
        "wait": saver.wait,
        "close": saver.close,
    }
    with pytest.raises(Exception, match="pickle") as raised:
        calls[call]()
    assert not isinstance(raised.value, OSError)
    with pytest.raises(type(raised.value)):
        saver.wait()  # nothing was saved
    save(saver, 3)
    saver.wait()
    assert steps(saver) == [3]


def test_the_network_is_there_before_the_checkpoint(saver: Saver, store: Gated) -> None:
    save(saver, 1)
    deadline = time.monotonic() + 20
    while not saver.model.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert steps(saver) == []
    assert read_model(saver.model)["about"] == {"steps": "1"}


def test_an_exit_waits_for_the_save_under_way(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", EXITS, tmp_path]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=50)
    assert done.returncode == 0, done.stderr
    for way in ("end", "exit", "raise"):
        store = CheckpointStore(tmp_path / way)
        assert_bitwise_equal(store.load_newest(pytest.fail), {"progress": {}, "state": {"w": torch.ones(3)}})
