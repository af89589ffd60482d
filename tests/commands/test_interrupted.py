"""Ctrl-C on a real command: saved, exit 75, and the command it prints goes on."""

import os
import shlex
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pcl_fast.sinks import read_records
from tests.commands.conftest import Process
from tests.tiny import newest_checkpoint

COMMAND = shlex.split(
    "train cifar10-resnet32-vanilla --model resnet8 --data.subset 64 --train.batch-size 16 --device cpu "
    "--amp.dtype float32 --train.epochs 15 --train.eval-every 15 --train.save-every 15 --train.log-every 1 "
    "--run-dir 'my runs/first' --no-resume"
)
STEPS = 60


def wait_for_records(path: Path, child: Process) -> None:
    deadline = time.monotonic() + 100
    while not read_records(path):
        assert child.poll() is None, "it ended before its first step"
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.timeout(300)
def test_ctrl_c_saves_and_the_printed_command_finishes_the_run(
    tmp_path: Path, pcl_fast: Callable[..., Process]
) -> None:
    run = tmp_path / "my runs" / "first"
    with pcl_fast(*COMMAND, cwd=tmp_path) as child:
        try:
            wait_for_records(run / "metrics.jsonl", child)
            os.kill(child.pid, signal.SIGINT)
            _, err = child.communicate(timeout=90)
        finally:
            child.kill()
    assert child.returncode == 75, err
    stopped, go_on = err.splitlines()
    step = newest_checkpoint(run)["progress"]["steps_done"]
    assert 1 <= step < STEPS
    assert stopped == f"pcl-fast: stopped by SIGINT after step {step}; everything is saved"
    assert len(read_records(run / "metrics.jsonl")) == step + step // 4

    program, *words = shlex.split(go_on.removeprefix("to go on:  "))
    assert program == "pcl-fast"
    with pcl_fast(*words, cwd=tmp_path) as again:
        out, err = again.communicate(timeout=90)
    assert (again.returncode, err) == (0, "")
    assert f"resuming after step {step} of {STEPS}" in out
    assert "top-1 after epoch 15: vanilla" in out
    records = read_records(run / "metrics.jsonl")
    assert [record["step"] for record in records if record["kind"] == "step"] == list(range(1, STEPS + 1))
    assert [path.name for path in run.parent.iterdir()] == ["first"], "nothing was begun anew"
