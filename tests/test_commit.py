"""Which commit the package is of."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pcl_fast.commit import commit

REPOSITORY = Path(__file__).parent.parent


def test_the_commit_is_that_of_the_repository() -> None:
    git = ["git", "-C", REPOSITORY, "rev-parse", "HEAD"]
    done = subprocess.run(git, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"not a git checkout: {done.stderr.strip()}")
    found = commit()
    assert found is not None
    assert found.removesuffix("+") == done.stdout.strip()


def test_there_is_no_commit_outside_a_repository_nor_without_git(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "pcl_fast"
    copy.mkdir()
    for name in ("__init__.py", "commit.py"):
        shutil.copy(REPOSITORY / "pcl_fast" / name, copy)
    subprocess.run(["git", "init", "-q", tmp_path], check=True)  # of somebody else, who does not track it
    ask = "from pcl_fast.commit import commit; print(commit())"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", ask], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=50
    )
    assert done.stdout == "None\n", done.stderr
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit() is None
