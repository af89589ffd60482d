"""The list of images that were left out, on the screen and beside the file."""

from collections.abc import Callable, Sequence
from pathlib import Path

from pcl_fast import atomic
from pcl_fast.manifest import Quarantined

SHOWN = 20


def quarantine_path(destination: Path) -> Path:
    """Where the list is written: a line for each image, its path, a tab, and the reason."""
    return destination.with_name(destination.name + ".quarantine.txt")


def write_quarantine(destination: Path, bad: Sequence[Quarantined], report: Callable[[str], None]) -> Path:
    """Write and report the list; without bad images an older list is removed."""
    path = quarantine_path(destination)
    if not bad:
        path.unlink(missing_ok=True)
        return path
    lines = [f"{image.path}\t{' '.join(image.reason.split())}" for image in bad]
    atomic.write_text(path, "\n".join(lines) + "\n")
    report(f"{len(bad):,} image{'s' * (len(bad) > 1)} cannot be used:")
    for line in lines[:SHOWN]:
        report("  " + line.replace("\t", ": "))
    if len(lines) > SHOWN:
        report(f"  and {len(lines) - SHOWN:,} more in {path}")
    return path
