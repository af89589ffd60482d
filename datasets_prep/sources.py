"""Finding a release in what a user points at: a folder, an archive, or a folder with either inside."""

import gzip
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from datasets_prep.cifar import Release
from datasets_prep.layouts import LAYOUTS, Layout
from pcl_fast.errors import DataError

# What the standard library raises over cut, damaged or encrypted archives.
DAMAGE = (
    tarfile.TarError,
    zipfile.BadZipFile,
    gzip.BadGzipFile,
    zlib.error,
    EOFError,
    RuntimeError,
    NotImplementedError,
    ValueError,
)
ARCHIVE_ENDINGS = (".tar.gz", ".tgz", ".zip")


@dataclass(frozen=True, slots=True)
class Found:
    """A folder that holds every file of a release, the form they are in, and where they came from."""

    layout: Layout
    folder: Path
    origin: str


def find_release(release: Release, source: Path, scratch: Path) -> Found:
    """Find `release` in `source`: a folder (also one folder deeper) or an archive.

    What is needed of an archive is unpacked below the folder `scratch`. DataError, saying what was
    looked for and what is missing, if the release is not there or the archive is damaged.
    """
    source = source.expanduser()
    if not source.exists():
        raise DataError(f"{release.name}: the source {source} does not exist")
    if source.is_file():
        return _in_archive(release, source, scratch)
    folders = _folder_and_children(source)
    if found := _in_folders(release, folders):
        return found
    archives = [path for folder in folders for path in sorted(folder.iterdir()) if _is_archive(release, path)]
    if archives:
        return _in_archive(release, archives[0], scratch)
    raise DataError(_nothing_found(release, folders, source))


def _folder_and_children(source: Path) -> list[Path]:
    return [source, *sorted(child for child in source.iterdir() if child.is_dir())]


def _in_folders(release: Release, folders: list[Path], archive: Path | None = None) -> Found | None:
    for layout in LAYOUTS:
        files = layout.files(release)
        for folder in folders:
            if files and all((folder / file).is_file() for file in files):
                return Found(layout, folder, str(archive or folder))
    return None


def _is_archive(release: Release, path: Path) -> bool:
    """Whether the name tells an archive of this release: folders of downloads hold many others."""
    known = [archive.file.removesuffix(".tar.gz") for archive in release.archives]
    if release.npm_package:
        known.append(release.npm_package.replace("@", "-"))
    return path.is_file() and path.name.endswith(ARCHIVE_ENDINGS) and path.name.startswith(tuple(known))


def _nothing_found(release: Release, folders: list[Path], origin: Path) -> str:
    """The message: which file the most complete form lacks, or which forms were looked for."""
    forms = [(layout, layout.files(release)) for layout in LAYOUTS if layout.files(release)]
    lacking = [
        (len(missing) / len(files), layout.title, missing)
        for layout, files in forms
        for folder in folders
        if len(missing := [file for file in files if not (folder / file).is_file()]) < len(files)
    ]
    if lacking:
        _, title, missing = min(lacking)
        return f"{release.name}: {origin} holds part of the {title}, without {', '.join(missing)}"
    wanted = " or ".join(f"{files[0]} .. {files[-1]} ({layout.title})" for layout, files in forms)
    return f"{release.name}: {origin} does not hold it; looked for {wanted}, also one folder deeper"


def _in_archive(release: Release, archive: Path, scratch: Path) -> Found:
    unpacked = scratch / "unpacked"
    unpacked.mkdir(parents=True)
    wanted = {file for layout in LAYOUTS for file in layout.files(release)}
    try:
        members = _zip_members(archive) if zipfile.is_zipfile(archive) else _tar_members(archive)
        _unpack(members, wanted, unpacked)
    except DAMAGE as error:
        raise DataError(
            f"{release.name}: {archive} is cut, damaged or no .tar.gz, .tgz or .zip ({error}); get it again"
        ) from error
    folders = _folder_and_children(unpacked)
    found = _in_folders(release, folders, archive)
    if found is None:
        raise DataError(_nothing_found(release, folders, archive))
    return found


def _tar_members(archive: Path) -> Iterator[tuple[str, IO[bytes]]]:
    with tarfile.open(archive, "r:gz") as tar:
        for member in tar:
            # Opens nothing but plain files; a link's target would be another member's business.
            if member.isreg() and (stream := tar.extractfile(member)):
                yield member.name, stream


def _zip_members(archive: Path) -> Iterator[tuple[str, IO[bytes]]]:
    with zipfile.ZipFile(archive) as opened:
        for entry in opened.infolist():
            if not entry.is_dir():
                yield entry.filename, opened.open(entry)


def _unpack(members: Iterator[tuple[str, IO[bytes]]], wanted: set[str], unpacked: Path) -> None:
    """Write the wanted files, each folder of the archive as a numbered one.

    No path of the archive is ever used as a path here, so none can lead out of `unpacked`.
    """
    numbers: dict[PurePosixPath, int] = {}
    for name, stream in members:
        path = PurePosixPath(name)
        with stream:
            if path.name not in wanted:
                continue
            folder = unpacked / str(numbers.setdefault(path.parent, len(numbers)))
            folder.mkdir(exist_ok=True)
            with (folder / path.name).open("wb") as out:
                shutil.copyfileobj(stream, out, 1 << 20)
