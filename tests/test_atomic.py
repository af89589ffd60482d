"""A file is what it was before or what it is to be, whatever happens in between."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pcl_fast import atomic
from tests.conftest import REPOSITORY
from tests.tiny import files_limited_to

DIE_WHILE_WRITING = """
import os, signal, sys
from pathlib import Path
from pcl_fast import atomic

with atomic.replacing(Path(sys.argv[1])) as temporary:
    temporary.write_bytes(b"half of the new")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_new_file_in_a_new_folder(tmp_path: Path) -> None:
    atomic.write_text(tmp_path / "a" / "b" / "file", "grüße\n")
    assert (tmp_path / "a" / "b" / "file").read_bytes() == "grüße\n".encode()
    assert names(tmp_path / "a" / "b") == ["file"]


def test_the_old_file_stays_readable_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with atomic.replacing(path) as temporary:
        temporary.write_bytes(b"new, and longer")
        assert path.read_bytes() == b"old"
        assert temporary.parent == path.parent, "a rename across file systems is no rename"
    assert path.read_bytes() == b"new, and longer"
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_the_old_file_and_no_temporary(
    tmp_path: Path, error: type[BaseException]
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail() -> None:
        with atomic.replacing(path) as temporary:
            temporary.write_bytes(b"half")
            raise error

    with pytest.raises(error):
        fail()
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_nothing_written_is_an_error_not_an_empty_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic.replacing(tmp_path / "file"):
        assert names(tmp_path) == []
    assert names(tmp_path) == []


def test_a_full_disk_leaves_the_old_file_and_no_temporary(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with files_limited_to(1000), pytest.raises(OSError, match="File too large"):
        atomic.write_bytes(path, bytes(5000))
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_a_kill_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    (tmp_path / "mine.part").write_bytes(b"not ours")
    (tmp_path / ".hidden").write_bytes(b"not ours")
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", DIE_WHILE_WRITING, str(path)], env=environment)
    assert done.returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old"
    assert len(names(tmp_path)) == 4, "the dead process could not tidy up"
    atomic.remove_leftovers(tmp_path)
    assert names(tmp_path) == [".hidden", "file", "mine.part"]
    atomic.remove_leftovers(tmp_path / "absent")


def test_two_writers_do_not_disturb_each_other(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with atomic.replacing(path) as one, atomic.replacing(path) as other:
        assert one != other
        one.write_bytes(b"one")
        other.write_bytes(b"other")
    assert path.read_bytes() == b"one", "the last rename wins"
    assert names(tmp_path) == ["file"]
