"""Parts that go wrong in every way, and what is kept of them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pcl_fast.cli import main
from pcl_fast.errors import ConfigError, DataError
from pcl_fast.profile.gpu import runner
from pcl_fast.profile.gpu.found import FILE, Found
from pcl_fast.profile.gpu.report import BEGIN
from pcl_fast.profile.gpu.runner import Outcome, Part, run_part, run_parts
from tests.conftest import HAS_GPU

REPOSITORY = Path(__file__).resolve().parents[2]
ROW = "import sys; file = open(sys.argv[1], 'ab', buffering=0); file.write(b'{\"what\": \"test\"}\\n');"


def part(script: str, limit: float = 20, name: str = "some") -> Part:
    """A part that writes one row and then runs a script, which may write more to `file`."""
    words = [sys.executable, "-c", ROW + script]
    return Part(name=name, about="a test", limit=limit, command=lambda rows, seconds: [*words, str(rows)])


def test_a_part_that_ends_well() -> None:
    outcome = run_part(part("print('not kept')"), limit=20)
    assert outcome.done
    assert outcome.rows == [{"what": "test"}]
    assert outcome.log == ""
    assert 0 < outcome.seconds < 20


def test_a_part_that_raises_keeps_its_rows_and_what_it_said() -> None:
    outcome = run_part(part("raise ValueError('broken here')"), limit=20)
    assert outcome.status == "failed with exit code 1"
    assert outcome.rows == [{"what": "test"}]
    assert outcome.log.endswith("ValueError: broken here\n")


def test_a_part_that_crashes() -> None:
    outcome = run_part(part("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"), limit=20)
    assert outcome.status == "ended by SIGSEGV"
    assert outcome.rows == [{"what": "test"}]


def test_a_part_that_hangs_is_killed_with_all_that_it_started() -> None:
    hang = "import time; time.sleep(60)"
    script = (
        f"import subprocess, time; child = subprocess.Popen([sys.executable, '-c', '{hang}']);"
        f"file.write(b'{{\"child\": %d}}\\n' % child.pid); {hang}"
    )
    outcome = run_part(part(script), limit=3)
    assert outcome.status == "killed after 3 s"
    assert 3 <= outcome.seconds < 15
    child = outcome.rows[1]["child"]
    deadline = time.monotonic() + 10
    while is_running(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(child)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_a_torn_row_is_left_out() -> None:
    outcome = run_part(part("file.write(b'{\"what\": ')"), limit=20)
    assert outcome.done
    assert outcome.rows == [{"what": "test"}]


def test_what_does_not_fit_into_the_time_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "LEAST", 2.0)
    outcomes: dict[str, Outcome] = {}
    hang = "import time; time.sleep(60)"
    parts = [part("", name="quick"), part(hang, name="hangs"), part("", name="late"), part("", 0.5, "small")]
    began = time.monotonic()
    run_parts(parts, 4, lambda one, outcome: outcomes.update({one.name: outcome}))
    assert time.monotonic() - began < 15
    assert list(outcomes) == ["quick", "hangs", "late", "small"]
    assert outcomes["quick"].done
    assert outcomes["hangs"].status.startswith("killed after")  # by what was left, not by its own limit
    assert outcomes["hangs"].seconds < 5
    for name in ("late", "small"):
        assert outcomes[name].status == "not run: 0 s were left of 4 s"
        assert outcomes[name].rows == []


KILLED = """
import sys
from pathlib import Path
from pcl_fast.commands.profile import gpu as profile_gpu
from pcl_fast.profile.gpu.runner import Part
row = "import sys; open(sys.argv[1], 'a').write('{\\"what\\": \\"test\\"}\\\\n');"
hang = f"import os, time; open({sys.argv[2]!r}, 'w').write(str(os.getpid())); time.sleep(60)"
scripts = {"first": row, "second": row + hang}
profile_gpu.JOBS.clear()
profile_gpu.JOBS.update({name: profile_gpu.Job(name, 60, print) for name in scripts})
def make(name, asked):
    command = lambda rows, seconds: [sys.executable, "-c", scripts[name], str(rows)]
    return Part(name=name, about=name, limit=60, command=command)
profile_gpu._part = make
profile_gpu.main(["--rehearse", "--out", sys.argv[1]])
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=str)
def test_a_run_that_is_killed_has_kept_every_part_before(tmp_path: Path, number: signal.Signals) -> None:
    out = tmp_path / "measurements"
    command, second = [sys.executable, "-c", KILLED, str(out), str(tmp_path / "pid")], tmp_path / "pid"
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 50
        while not (second.exists() and second.read_text()) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(number)
        process.wait(10)
    pid = int(second.read_text())
    if number == signal.SIGTERM:
        assert process.returncode == 128 + signal.SIGTERM
        assert not is_running(pid)
    else:
        os.kill(pid, signal.SIGKILL)
    found = Found.load(out / FILE)
    assert list(found.parts) == ["first"]
    assert found.parts["first"]["rows"] == [{"what": "test"}]
    assert BEGIN in (tmp_path / "measurements.md").read_text()


@pytest.mark.skipif(HAS_GPU, reason="there is a CUDA device")
def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", "gpu", "--out", str(tmp_path / "m")]) == ConfigError.exit_code
    said = " ".join(capsys.readouterr().err.split())
    assert "torch finds no CUDA device here" in said
    assert "--rehearse" in said
    assert list(tmp_path.iterdir()) == []


def test_wrong_parts_and_files_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["profile", "gpu", "--rehearse", "--out", str(tmp_path)]
    assert main([*words, "--only", "devise"]) == ConfigError.exit_code
    assert "Did you mean 'device'?" in capsys.readouterr().err
    for text in ("{", "[]", "{}", '{"parts": {"device": 1}}'):
        (tmp_path / FILE).write_text(text)
        assert main([*words, "--only", "device"]) == DataError.exit_code
        assert "not measurements of a GPU" in capsys.readouterr().err
