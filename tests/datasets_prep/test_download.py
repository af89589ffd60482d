"""Downloads against a real server on this machine: resumed, restarted, checked, given up in time."""

import hashlib
import socket
import time
from pathlib import Path

import pytest

from datasets_prep.cifar import Archive
from datasets_prep.download import DownloadError, Patience, download
from datasets_prep.progress import transfer_meter
from tests.datasets_prep.server import Server

DATA = hashlib.shake_256(b"pcl_fast").digest(300_000)
QUICK = Patience(timeout_s=0.5, tries=3, pause_s=0.0)


def silent(done: int, total: int | None) -> None:
    """Show nothing."""


def archive_at(server: Server, data: bytes = DATA, published: bytes = DATA) -> Archive:
    server.files["set.tar.gz"] = data
    return Archive(server.url("set.tar.gz"), hashlib.md5(published).hexdigest())


def test_whole_file_and_its_progress(server: Server, tmp_path: Path):
    seen: list[tuple[int, int | None]] = []
    path = download(archive_at(server), tmp_path, lambda done, total: seen.append((done, total)), QUICK)
    assert path == tmp_path / "set.tar.gz"
    assert path.read_bytes() == DATA
    assert seen[0] == (0, 300_000)
    assert seen[-1] == (300_000, 300_000)
    assert seen == sorted(seen)
    assert [entry.name for entry in tmp_path.iterdir()] == ["set.tar.gz"]


def test_without_a_told_length(server: Server, tmp_path: Path):
    server.tells_length = False
    assert download(archive_at(server), tmp_path, silent, QUICK).read_bytes() == DATA


def test_present_archive_is_not_asked_for_again(server: Server, tmp_path: Path):
    (tmp_path / "set.tar.gz").write_bytes(DATA)
    download(archive_at(server), tmp_path, silent, QUICK)
    assert server.requests == []


def test_cuts_are_resumed(server: Server, tmp_path: Path):
    server.cuts = [100_000, 50_000, 1]
    assert download(archive_at(server), tmp_path, silent, QUICK).read_bytes() == DATA
    ranges = [asked for _, asked in server.requests]
    assert ranges == [None, "bytes=100000-", "bytes=150000-", "bytes=150001-"]


def test_stalls_are_resumed(server: Server, tmp_path: Path):
    server.cuts, server.stalls = [100_000], True
    start = time.monotonic()
    assert download(archive_at(server), tmp_path, silent, QUICK).read_bytes() == DATA
    assert 0.5 <= time.monotonic() - start < 5
    assert [asked for _, asked in server.requests] == [None, "bytes=100000-"]


def test_an_earlier_part_is_resumed(server: Server, tmp_path: Path):
    (tmp_path / "set.tar.gz.part").write_bytes(DATA[:299_000])
    assert download(archive_at(server), tmp_path, silent, QUICK).read_bytes() == DATA
    assert server.requests == [("set.tar.gz", "bytes=299000-")]


def test_a_complete_part_is_taken(server: Server, tmp_path: Path):
    (tmp_path / "set.tar.gz.part").write_bytes(DATA)
    assert download(archive_at(server), tmp_path, silent, QUICK).read_bytes() == DATA
    assert server.requests == [("set.tar.gz", "bytes=300000-")]  # answered with 416


@pytest.mark.parametrize("rotten", [bytes(1000), bytes(400_000)], ids=["short", "too long"])
def test_a_rotten_part_is_begun_anew(rotten: bytes, server: Server, tmp_path: Path):
    (tmp_path / "set.tar.gz.part").write_bytes(rotten)
    assert download(archive_at(server), tmp_path, silent, QUICK).read_bytes() == DATA
    assert server.requests[-1] == ("set.tar.gz", None)


def test_a_server_without_ranges(server: Server, tmp_path: Path):
    server.knows_ranges = False
    server.cuts = [200_000]
    assert download(archive_at(server), tmp_path, silent, QUICK).read_bytes() == DATA
    assert [asked for _, asked in server.requests] == [None, "bytes=200000-"]


def test_wrong_content_is_refused_and_removed(server: Server, tmp_path: Path):
    archive = archive_at(server, data=b"<html>Please log in</html>")
    with pytest.raises(DownloadError, match=rf"has the MD5 \w+, not {archive.md5}"):
        download(archive, tmp_path, silent, QUICK)
    assert list(tmp_path.iterdir()) == []
    assert len(server.requests) == 1


def test_error_of_the_server(server: Server, tmp_path: Path):
    with pytest.raises(DownloadError, match="HTTP 404 Not Found") as caught:
        download(Archive(server.url("absent.tar.gz"), ""), tmp_path, silent, QUICK)
    assert caught.value.reached


def test_endless_cuts_are_given_up_and_kept(server: Server, tmp_path: Path):
    server.cuts = [1000] + [0] * 20
    with pytest.raises(DownloadError, match="the connection ended after 1000 of 300000 bytes") as caught:
        download(archive_at(server), tmp_path, silent, QUICK)
    assert caught.value.reached
    assert len(server.requests) == 1 + QUICK.tries
    assert (tmp_path / "set.tar.gz.part").read_bytes() == DATA[:1000]


def test_refused_connection_is_given_up_at_once(tmp_path: Path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, but nobody listens
        archive = Archive(f"http://127.0.0.1:{taken.getsockname()[1]}/set.tar.gz", "")
        with pytest.raises(DownloadError, match=r"no connection .*refused") as caught:
            download(archive, tmp_path, silent, Patience(pause_s=60))
    assert not caught.value.reached


def test_silent_server_is_given_up(tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as mute:
        archive = Archive(f"http://127.0.0.1:{mute.getsockname()[1]}/set.tar.gz", "")
        start = time.monotonic()
        with pytest.raises(DownloadError, match="timed out"):
            download(archive, tmp_path, silent, QUICK)
    assert time.monotonic() - start < 5


def test_progress_off_a_terminal_is_ten_lines():
    lines: list[str] = []
    with transfer_meter("set", lines.append) as meter:
        for done in range(0, 2_000_001, 10_000):
            meter(done, 2_000_000)
    assert len(lines) == 10
    assert lines[4] == "set: 1.0 of 2.0 MB"
