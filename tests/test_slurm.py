"""The job script of docs/, with stand-ins for Slurm's own commands: what it does about signals and exits."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "docs" / "slurm.sh"
# srun runs what stands for the step; scancel signals it, as Slurm signals the processes of a step.
STAND_INS = {
    "scontrol": '[ "$1" = show ] && { printf "node1\\nnode2\\n"; exit; }; echo "scontrol $*" >> log',
    "scancel": 'echo "scancel $*" >> log; kill -TERM "$(cat step.pid)"',
    "srun": 'echo $$ > step.pid; echo "srun $*" >> log; exec bash step.sh',
}


def begin(folder: Path, step: str) -> subprocess.Popen[bytes]:
    """The script under way, with two arguments for the training."""
    bash = shutil.which("bash")
    assert bash is not None
    for name, body in STAND_INS.items():
        (folder / name).write_text(f"#!{bash}\n{body}\n")
        (folder / name).chmod(0o755)
    (folder / "step.sh").write_text(step)
    given = {
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_NNODES": "2",
        "SLURM_JOB_ID": "17",
        "SLURM_GPUS_ON_NODE": "4",
    }
    path = f"{folder}:{os.environ['PATH']}"
    words = [bash, str(SCRIPT), "imagenet-r18", "--seed", "3"]
    return subprocess.Popen(words, cwd=folder, env={**os.environ, "PATH": path, **given})


def told(folder: Path) -> list[str]:
    """What Slurm was told."""
    return (folder / "log").read_text().splitlines()


@pytest.mark.parametrize("code", [0, 3])
def test_the_steps_exit_code_is_the_jobs(tmp_path: Path, code: int) -> None:
    assert begin(tmp_path, f"exit {code}").wait(20) == code
    (srun,) = told(tmp_path)
    assert "--nnodes 2 --nproc-per-node 4" in srun
    assert "--rdzv-endpoint node1:29500 --rdzv-id 17-0" in srun
    assert srun.endswith("-m pcl_fast train imagenet-r18 --seed 3")


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_warning_saves_and_goes_back_into_the_queue(tmp_path: Path, number: int) -> None:
    saving = (
        "trap 'sleep 0.3; echo saved >> log; exit 75' TERM; echo began >> log; while :; do sleep 0.05; done"
    )
    job = begin(tmp_path, saving)
    deadline = time.monotonic() + 20
    while not (tmp_path / "log").exists() or "began" not in told(tmp_path):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    job.send_signal(number)
    assert job.wait(20) == 0
    assert told(tmp_path)[2:] == ["scancel --signal=TERM 17", "saved", "scontrol requeue 17"]
