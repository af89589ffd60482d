"""The network that a run has left: `model.safetensors` of its folder, read for whoever goes on from it."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from pcl_fast.errors import ConfigError, DataError

MODEL = "model.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunNetwork:
    """A plain network: its name, its tensors by their names, and the SHA-256 of its file, in hexadecimal."""

    path: Path
    model: str
    tensors: dict[str, Tensor]
    sha256: str


def network_file(given: Path) -> Path:
    """The file that is meant by the folder of a run, or by a file itself."""
    return given / MODEL if given.is_dir() else given


def read_network(given: Path, flag: str, fix: str) -> RunNetwork:
    """What the folder of a run, or a file, holds.

    Raises:
        ConfigError: if it is not there, with `fix`.
        DataError: if it is no network of a run, or damaged.
    """
    path = network_file(given)
    if not path.is_file():
        raise ConfigError(f"{flag} {path}: not there; {fix}")
    try:
        content = path.read_bytes()
        tensors = load(content)
        model = _about(content)["model"]
    except (SafetensorError, KeyError, OSError) as error:
        raise DataError(f"{flag} {path}: not a network of a run ({error})") from None
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise DataError(f"{flag} {path}: damaged: '{name}' holds numbers that are not finite")
    return RunNetwork(path=path, model=model, tensors=tensors, sha256=hashlib.sha256(content).hexdigest())


def _about(content: bytes) -> dict[str, str]:
    """What is noted in a safetensors file, behind the eight bytes that say how long that is."""
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]).get("__metadata__", {})
