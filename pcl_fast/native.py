"""C++ for the CPU: compiled once for this processor, kept in a cache folder, loaded by ctypes."""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-fopenmp")
SHARED = ("-shared", "-fPIC", "-march=native")
COMPILE_SECONDS = 300


class KernelUnavailableError(Exception):
    """A kernel cannot be had here; the message is the reason."""


@functools.cache
def load(source: Path) -> ctypes.CDLL:
    """The library of a C++ file; KernelUnavailableError if there is no way to it."""
    try:
        library = library_path(source)
        if not library.exists():
            compile_library(source, library)
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise KernelUnavailableError(f"{source.stem}: {error}") from None


@functools.cache
def function(source: Path, symbol: str, arguments: tuple[Any, ...]) -> Callable[..., None]:
    """A function of that library that returns nothing, with the ctypes of its arguments."""
    found = getattr(load(source), symbol)
    found.argtypes, found.restype = arguments, None
    return found


@functools.cache
def why_unavailable(source: Path) -> str | None:
    """The reason, in one line, why `load` fails; None if it does not."""
    try:
        load(source)
    except KernelUnavailableError as error:
        return str(error)
    return None


def library_path(source: Path) -> Path:
    """Where the library lies: one for each version of the source, the compiler and the processor."""
    version = subprocess.run([compiler(), "--version"], capture_output=True, text=True, check=False).stdout
    texts = [path.read_text() for path in (source, *sorted(source.parent.glob("*.h")))]
    ingredients = (*texts, *FLAGS, *SHARED, version, _processor())
    digest = hashlib.sha256("\0".join(ingredients).encode()).hexdigest()[:16]
    return cache_folder() / f"{source.stem}-{digest}.so"


def compile_library(source: Path, library: Path) -> None:
    """Compile, and put the library in place whole: several processes may do so at once."""
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        made = Path(folder) / library.name
        command = [compiler(), *FLAGS, *SHARED, "-o", str(made), str(source)]
        try:
            result = subprocess.run(
                command, capture_output=True, text=True, check=False, timeout=COMPILE_SECONDS
            )
        except subprocess.TimeoutExpired:
            raise KernelUnavailableError(f"{command[0]} took over {COMPILE_SECONDS} seconds") from None
        if result.returncode:
            lines = result.stderr.strip().splitlines() or [f"exit code {result.returncode}"]
            reason = next((line for line in lines if "error" in line), lines[0])
            raise KernelUnavailableError(f"{command[0]} failed on {source.name}: {reason}")
        made.replace(library)


def compiler() -> str:
    """$CXX, or the first C++ compiler on the path; KernelUnavailableError if there is none."""
    wanted = os.environ.get("CXX")
    for name in [wanted] if wanted else ["c++", "g++", "clang++"]:
        if found := shutil.which(name):
            return found
    raise KernelUnavailableError(f"no C++ compiler ({wanted or 'c++, g++, clang++'} not found)")


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/pcl_fast, by default ~/.cache/pcl_fast."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The XDG base directory specification has relative paths ignored.
    return (base if base.is_absolute() else Path.home() / ".cache") / "pcl_fast"


def _processor() -> str:
    """What `-march=native` depends on, so that machines may share a home folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
