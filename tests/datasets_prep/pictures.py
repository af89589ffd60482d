"""Pictures, folders of them, and conversions without ceremony, for the tests of conversions."""

import io
import os
import subprocess
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from datasets_prep.conversion.codec import ImageOptions
from datasets_prep.convert import ConvertOptions, Progress, convert
from datasets_prep.listings.listing import list_folder
from pcl_fast.manifest import Manifest
from tests.conftest import REPOSITORY

# The command line but for its first word, which tells where to find the rest.
COMMAND = """
import importlib, sys
from pcl_fast.errors import PclError
try:
    importlib.import_module(f"pcl_fast.commands.{sys.argv[1]}").main(sys.argv[2:])
except PclError as error:
    sys.exit(sys.stderr.write(f"pcl-fast: error: {error}\\n") and error.exit_code)
"""


def picture(seed: int = 0, width: int = 64, height: int = 48) -> Image.Image:
    """Coarse random blobs: JPEG keeps them well, and no two are alike."""
    draws = np.random.default_rng(seed)
    coarse = draws.integers(0, 256, (max(2, height // 12), max(2, width // 12), 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def decoded(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def write_folder(folder: Path, images: int = 12, classes: int = 3, **size: int) -> Path:
    """`images` JPEGs in turn in the folders c0, c1, ..."""
    for number in range(images):
        place = folder / f"c{number % classes}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number:04}.jpg").write_bytes(encoded(picture(number, **size), quality=95))
    return folder


class Stopped(Exception):
    """Raised in the middle of a conversion."""


def stopping_at(images: int) -> Progress:
    """A progress display that raises Stopped when so many images are done."""

    @contextmanager
    def progress(first: int, total: int) -> Generator[Callable[[int], None]]:
        def show(done: int) -> None:
            if done >= images:
                raise Stopped

        yield show

    return progress


def convert_folder(
    source: Path,
    destination: Path,
    said: list[str] | None = None,
    image: ImageOptions | None = None,
    stop_at: int = 1 << 60,
    **options: Any,
) -> Manifest:
    """Convert a folder; what is reported is appended to `said`."""
    options = {"workers": 1, "image": image or ImageOptions(), **options}
    settings = ConvertOptions(**options)
    report = (said if said is not None else []).append
    return convert(list_folder(source), destination, settings, report, stopping_at(stop_at))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def command(*words: str | Path, path: Path | None = None) -> subprocess.Popen[str]:
    """`pcl-fast WORDS` in a process of its own, for `convert` and `verify`, without loading torch.

    `path` comes first on its and its workers' module path.
    """
    paths = [str(folder) for folder in (path, REPOSITORY) if folder]
    variables = {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "COLUMNS": "300"}
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, *map(str, words)],
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
