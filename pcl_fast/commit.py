"""Which commit this package is of, to be noted beside whatever it makes."""

import subprocess
from pathlib import Path

import pcl_fast


def commit() -> str | None:
    """The commit's hash, `+` if something was changed since; None outside a repository or without git."""
    if _git("ls-files", "__init__.py") is None:
        return None
    head = _git("rev-parse", "HEAD")
    return f"{head}+" if head and _git("status", "--porcelain", "-uno") else head


def _git(*words: str) -> str | None:
    """What git says of this package's folder; None if that is nothing, or there is no git or repository."""
    command = ["git", "-C", str(Path(pcl_fast.__file__).parent), *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
