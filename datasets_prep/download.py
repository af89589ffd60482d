"""Downloading a published archive: resumed where it was cut, checked, and never hanging."""

import hashlib
import http.client
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from datasets_prep.cifar import Archive
from datasets_prep.progress import Meter

BLOCK = 1 << 20


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to bear with a server: `timeout_s` for connecting and for every read.

    A transfer that brings something is taken up again after each cut; it is given up after `tries`
    cuts in a row without a new byte, and at once if the server was never reached.
    """

    timeout_s: float = 10.0
    tries: int = 5
    pause_s: float = 1.0


class DownloadError(Exception):
    """An archive that could not be had, with the reason; `reached` tells whether the server answered."""

    def __init__(self, reason: str, *, reached: bool) -> None:
        super().__init__(reason)
        self.reached = reached


class _CutError(Exception):
    """The connection failed or ended early."""


def download(archive: Archive, folder: Path, meter: Meter, patience: Patience) -> Path:
    """Download `archive` into `folder` and return its path, its MD5 being the published one.

    What came before a cut is kept as `<name>.part` and taken up by the next call. DownloadError if the
    server cannot be reached, refuses, or sends something else. Only one caller at a time, please.
    """
    path = folder / archive.file
    if path.is_file() and _md5_of(path) == archive.md5:
        return path
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{archive.file}.part"
    for has_old_bytes in (part.exists(), False):
        _transfer(archive.url, part, meter, patience)
        found = _md5_of(part)
        if found == archive.md5:
            os.replace(part, path)
            return path
        part.unlink()
        if not has_old_bytes:
            break
    raise DownloadError(f"{archive.url} has the MD5 {found}, not {archive.md5}", reached=True)


def _transfer(url: str, part: Path, meter: Meter, patience: Patience) -> None:
    """Fill `part`, resuming after cuts."""
    most = before = _size_of(part)
    tries_left = 1
    while True:
        try:
            return _fetch_rest(url, part, meter, patience.timeout_s)
        except _CutError as cut:
            size = _size_of(part)
            tries_left = patience.tries if size > most else tries_left - 1
            most = max(most, size)
            if not tries_left:
                raise DownloadError(f"{url}: {cut}", reached=most > before) from cut
        time.sleep(patience.pause_s)


def _fetch_rest(url: str, part: Path, meter: Meter, timeout_s: float) -> None:
    """One request for what `part` lacks; _CutError if it ends before the whole is there."""
    have = _size_of(part)
    headers = {"User-Agent": "pcl-fast", **({"Range": f"bytes={have}-"} if have else {})}
    response = _open(urllib.request.Request(url, headers=headers), timeout_s)
    if response is None:  # nothing lies beyond what we have; the checksum tells whether it is right
        return
    with response:
        start, total = _extent(response)
        if start not in (0, have):
            part.unlink()
            raise _CutError(f"the server sent bytes from {start} on, not from {have}")
        # A server that knows no ranges sends everything, and the file is begun anew.
        with part.open("ab" if start else "wb") as out:
            done = start
            meter(done, total)
            for block in _blocks(response):
                out.write(block)
                done += len(block)
                meter(done, total)
    if total is not None and done < total:
        raise _CutError(f"the connection ended after {done} of {total} bytes")


def _open(request: urllib.request.Request, timeout_s: float) -> http.client.HTTPResponse | None:
    """The response to `request`, or None if the range it asks for is empty."""
    try:
        return cast(http.client.HTTPResponse, urllib.request.urlopen(request, timeout=timeout_s))
    except urllib.error.HTTPError as error:
        with error:
            if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE and request.has_header("Range"):
                return None
            reason = f"{request.full_url}: HTTP {error.code} {error.reason}"
            raise DownloadError(reason, reached=True) from error
    except urllib.error.URLError as error:
        raise _CutError(f"no connection ({error.reason})") from error
    except (OSError, http.client.HTTPException) as error:
        raise _CutError(f"no connection ({error or type(error).__name__})") from error


def _blocks(response: http.client.HTTPResponse) -> Iterator[bytes]:
    try:
        # read1 returns what has arrived, so that the timeout bounds each wait and not a whole block.
        while block := response.read1(BLOCK):
            yield block
    except (OSError, http.client.HTTPException) as error:
        raise _CutError(f"the connection broke ({error or type(error).__name__})") from error


def _extent(response: http.client.HTTPResponse) -> tuple[int, int | None]:
    """Where the body starts in the file, and the size of the whole file if it is told."""
    if response.status == http.client.PARTIAL_CONTENT:
        told = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
        if told is None:
            raise _CutError("the server sent a part of the file without saying which")
        return int(told[1]), None if told[2] == "*" else int(told[2])
    length = response.headers.get("Content-Length")
    return 0, int(length) if length and length.isdigit() else None


def _size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _md5_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
