"""Checkpoints that are complete or absent, and a run folder that only one process uses."""

import fcntl
import io
import os
import socket
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor

from pcl_fast import atomic
from pcl_fast.errors import ConfigError

CONTENT = {"progress", "state"}  # the keys of every checkpoint
KEEP = 2  # complete checkpoints kept, so that a damaged newest one costs one interval only


class CheckpointStore:
    """The checkpoints of one run folder: `checkpoints/step-00001234.pt`, the newest two."""

    def __init__(self, run_dir: Path) -> None:
        self.folder = run_dir / "checkpoints"

    def save(self, state: dict[str, Any], step: int) -> Path:
        """Write a checkpoint, which has at least the keys CONTENT, then drop all but the newest two.

        OSError if the disk refuses; then all stay.
        """
        buffer = io.BytesIO()
        torch.save(state, buffer)
        path = self.folder / f"step-{step:08d}.pt"
        atomic.write_bytes(path, buffer.getvalue())
        for old in self.paths()[:-KEEP]:
            old.unlink()
        return path

    def paths(self) -> list[Path]:
        """All checkpoints, oldest first."""
        return sorted(self.folder.glob("step-*.pt"))

    def load_newest(self, warn: Callable[[str], None]) -> dict[str, Any] | None:
        """The newest checkpoint that is whole, on the CPU; None if there is none at all.

        A damaged one is passed over with a warning that names it and the one used instead.
        ConfigError if there are checkpoints and none can be read.
        """
        damaged: list[str] = []
        for path in reversed(self.paths()):
            try:
                state = _read(path)
            except Exception as error:  # any damage shows as some exception of zip, pickle or torch
                damaged.append(f"{path.name} ({type(error).__name__})")
                continue
            if damaged:
                warn(f"{self.folder}: damaged: {', '.join(damaged)}; going on from {path.name}")
            return state
        if damaged:
            listed = ", ".join(damaged)
            raise ConfigError(f"{self.folder}: no checkpoint can be read: {listed}; use another --run-dir")
        return None


def _read(path: Path) -> dict[str, Any]:
    with zipfile.ZipFile(path) as archive:  # torch.load does not check the CRC of each record; this does
        broken = archive.testzip()
        if broken is not None:
            raise zipfile.BadZipFile(broken)
    content = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, dict) or not content.keys() >= CONTENT:
        raise TypeError("not a checkpoint of a run")
    return content


def save_model(path: Path, tensors: dict[str, Tensor], about: dict[str, str]) -> None:
    """Write a deployable network as safetensors: exactly the plain backbone's names, and what it is."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    atomic.write_bytes(path, to_safetensors(plain, metadata=about))


class RunLock:
    """Holds a run folder for this process; ConfigError naming the holder if another one has it."""

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
            raise ConfigError(f"{run_dir}: in use by {holder}; {fix}") from None
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._file.flush()

    def close(self) -> None:
        """Let go of the folder."""
        self._file.close()
