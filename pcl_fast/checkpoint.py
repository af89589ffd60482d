"""Checkpoints that are complete or absent, and a run folder that only one process uses."""

import contextlib
import fcntl
import hashlib
import io
import os
import pickle
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor

from pcl_fast import atomic
from pcl_fast.errors import ConfigError, FolderInUse

CONTENT = {"progress", "state"}  # the keys of every checkpoint
KEEP = 2  # complete checkpoints kept, so that a damaged newest one costs one interval only

_NAME = re.compile(r"step-(\d{8,})\.pt")  # what else lies in the folder is not ours
_SEAL = b"sha256:"
_SEAL_BYTES = len(_SEAL) + 64


class CheckpointStore:
    """The checkpoints of one run folder: `checkpoints/step-00001234.pt`, the newest two.

    Each is what `torch.save` makes, with the SHA-256 of all its bytes as the comment that ends a zip file:
    torch and zip tools read it as it is, and no flipped, missing or added byte goes unnoticed.
    """

    def __init__(self, run_dir: Path) -> None:
        self.folder = run_dir / "checkpoints"

    def save(self, content: dict[str, Any], step: int) -> Path:
        """Write a checkpoint, which has at least the keys CONTENT, then drop all but the newest two.

        None is dropped before two others are known to be complete.
        OSError if the disk refuses; then all stay.
        """
        buffer = io.BytesIO()  # torch would hide an error of the disk in one of its own
        torch.save(content, buffer)
        path = self.folder / f"step-{step:08d}.pt"
        with atomic.replacing(path) as temporary, temporary.open("wb") as file:
            file.writelines(_sealed(buffer.getbuffer()))
        self._drop_old(path)
        return path

    def paths(self) -> list[Path]:
        """All checkpoints, by their names, oldest first."""
        found = {
            path: match for path in self.folder.glob("step-*.pt") if (match := _NAME.fullmatch(path.name))
        }
        files = [path for path in found if path.is_file()]
        return sorted(files, key=lambda path: int(found[path][1]))

    def load_newest(self, warn: Callable[[str], None], *, set_aside: bool = False) -> dict[str, Any] | None:
        """The newest checkpoint that is whole, on the CPU; None if there is none at all.

        A damaged one is passed over with a warning that names it and the one used instead; with
        `set_aside` it is also renamed to `NAME.damaged`, for the one process that goes on training.
        ConfigError if there are checkpoints and none can be read; then all stay where they are.
        """
        failures: dict[Path, Exception] = {}
        for path in reversed(self.paths()):
            try:
                content = _read(path)
            except FileNotFoundError:  # dropped since, by a training that has saved newer ones
                return self.load_newest(warn, set_aside=set_aside)
            except Exception as error:  # torch, pickle and the disk have many
                failures[path] = error
                continue
            if failures:
                listed = _listed(failures)
                if set_aside:
                    self._set_aside(
                        [bad for bad, error in failures.items() if isinstance(error, _DamagedError)]
                    )
                warn(f"{self.folder}: passed over: {listed}; going on from {path.name}")
            return content
        if failures:
            listed = _listed(failures)
            raise ConfigError(f"{self.folder}: no checkpoint can be read: {listed}; use another --run-dir")
        return None

    def _drop_old(self, written: Path) -> None:
        """Delete all but `written`, which was complete just now, and the newest other complete ones."""
        complete = 1
        for path in reversed(self.paths()):
            if path == written:
                continue
            if complete >= KEEP:
                path.unlink(missing_ok=True)
                continue
            with contextlib.suppress(OSError):  # what cannot be read now does not count
                complete += is_intact(path)

    def _set_aside(self, paths: list[Path]) -> None:
        with contextlib.suppress(OSError):  # passed over again next time
            for path in paths:
                os.replace(path, path.with_name(f"{path.name}.damaged"))
            atomic.sync(self.folder)


class _DamagedError(Exception):
    """A file that is no checkpoint of ours, or not any more, however often it is read."""


def is_intact(path: Path) -> bool:
    """Whether a checkpoint has the very bytes that were written. OSError if it cannot be read."""
    remaining = path.stat().st_size - _SEAL_BYTES
    if remaining < 0:
        return False
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while remaining and (part := file.read(min(remaining, 1 << 20))):
            digest.update(part)
            remaining -= len(part)
        return file.read() == _SEAL + digest.hexdigest().encode()


def _sealed(archive: memoryview) -> list[memoryview | bytes]:
    """A zip file, and the checksum to append to it, as the comment with which it then ends."""
    archive[-2:] = _SEAL_BYTES.to_bytes(2, "little")  # the comment's length, which was 0
    return [archive, _SEAL + hashlib.sha256(archive).hexdigest().encode()]


def _read(path: Path) -> dict[str, Any]:
    if not is_intact(path):
        raise _DamagedError("its checksum is wrong or missing")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise _DamagedError("it holds more than plain values and tensors") from None
    if not isinstance(content, dict) or not content.keys() >= CONTENT:
        raise _DamagedError("it is not a checkpoint of a run")
    return content


def _listed(failures: dict[Path, Exception]) -> str:
    """One line, whatever torch says in many."""
    reasons = {
        path.name: str(error) if isinstance(error, _DamagedError) else type(error).__name__
        for path, error in failures.items()
    }
    return ", ".join(f"{name} ({reason})" for name, reason in reasons.items())


def save_model(path: Path, tensors: dict[str, Tensor], about: dict[str, str]) -> None:
    """Write a deployable network as safetensors: exactly the plain backbone's names, and what it is."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    atomic.write_bytes(path, to_safetensors(plain, metadata=about))


class RunLock:
    """Holds a run folder for this process; FolderInUse naming the holder if another one has it."""

    def __init__(self, run_dir: Path) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        self._file = open(run_dir / ".lock", "a+")  # noqa: SIM115  # held until close()
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.seek(0)
            holder = self._file.read().strip() or "another process"
            self._file.close()
            fix = "wait for it, or use another --run-dir"
            raise FolderInUse(f"{run_dir}: in use by {holder}; {fix}") from None
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._file.flush()

    def close(self) -> None:
        """Let go of the folder."""
        self._file.close()
