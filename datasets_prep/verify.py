"""Is a .beton file what it was when it was made, and can every image of it be decoded?"""

import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from datasets_prep.conversion.codec import BadImage, decode_image
from datasets_prep.conversion.jpeg import read_markers
from pcl_fast.beton import JPG, BetonFile, open_beton
from pcl_fast.manifest import Manifest, manifest_path, read_manifest

CHUNK = 64
CHUNKS_AHEAD = 4

Progress = Callable[[int, int], AbstractContextManager[Callable[[int], None]]]


@dataclass(frozen=True, slots=True)
class Verified:
    """What was found; `problems` are lines, of the file as a whole and then of one sample each."""

    num_samples: int
    num_classes: int | None
    file_size: int
    has_manifest: bool
    problems: tuple[str, ...]


def verify(path: Path, workers: int, progress: Progress) -> Verified:
    """Check structure, labels, checksums, and that every sample can be decoded, in `workers` threads.

    DataError if the file cannot be opened at all, or its manifest cannot be read.
    """
    with open_beton(path) as beton:
        manifest = read_manifest(path)
        problems = _compare(beton, manifest) if manifest else []
        # Of another file, its checksums would call every sample damaged.
        checked = manifest if manifest and manifest.num_samples == beton.num_samples else None
        with progress(0, beton.num_samples) as show, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's; here, once for all threads
            for done, found in _in_threads(beton, checked, workers):
                problems += found
                show(done)
        classes = len(manifest.classes) if manifest else None
        return Verified(beton.num_samples, classes, beton.file_size, manifest is not None, tuple(problems))


def problem_of(beton: BetonFile, manifest: Manifest | None, sample: int) -> str | None:
    """What is wrong with one sample, or None."""
    label = int(beton.labels_N[sample])
    if manifest and label >= len(manifest.classes):
        return f"its label is {label}, but there are {len(manifest.classes)} classes"
    if manifest and beton.checksum(sample) != int(manifest.checksums_N[sample]):
        return "its checksum is wrong: the data have changed since they were written"
    if beton.modes_N[sample] != JPG:
        return None
    data = bytes(beton.encoded(sample))
    markers = read_markers(data)
    if markers is None:
        return "it is not a JPEG"
    try:
        size = decode_image(data, markers).size
    except BadImage as bad:
        return f"it cannot be decoded: {bad}"
    height, width = (int(side) for side in beton.sizes_N2[sample])
    return (
        None if size == (width, height) else f"it is {size[0]} x {size[1]}, the file says {width} x {height}"
    )


def _compare(beton: BetonFile, manifest: Manifest) -> list[str]:
    name = manifest_path(beton.path).name
    if manifest.num_samples != beton.num_samples:
        return [f"it holds {beton.num_samples:,} samples, {name} describes {manifest.num_samples:,}"]
    if manifest.structure_crc32 != beton.structure_crc32:
        return [f"its labels or its index are not those that {name} describes"]
    return []


def _in_threads(beton: BetonFile, manifest: Manifest | None, workers: int) -> Iterator[tuple[int, list[str]]]:
    """The samples done so far, and the problems of the last of them, in order."""

    def check(samples: range) -> list[str]:
        found = ((sample, problem_of(beton, manifest, sample)) for sample in samples)
        return [
            f"sample {sample}{_class_of(beton, manifest, sample)}: {what}" for sample, what in found if what
        ]

    chunks = (
        range(first, min(first + CHUNK, beton.num_samples)) for first in range(0, beton.num_samples, CHUNK)
    )
    waiting: deque[tuple[int, Future[list[str]]]] = deque()
    with _threads(workers) as pool:
        while True:
            for samples in islice(chunks, CHUNKS_AHEAD * workers - len(waiting)):
                waiting.append((samples.stop, pool.submit(check, samples)))
            if not waiting:
                return
            done, found = waiting.popleft()
            yield done, found.result()


@contextmanager
def _threads(workers: int) -> Generator[ThreadPoolExecutor]:
    """Threads that stop soon, also on Ctrl-C."""
    pool = ThreadPoolExecutor(workers)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _class_of(beton: BetonFile, manifest: Manifest | None, sample: int) -> str:
    label = int(beton.labels_N[sample])
    return f" ({manifest.classes[label]})" if manifest and label < len(manifest.classes) else ""
