"""A network that a finished run has left, to teach another one."""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pcl_fast.config import Config
from pcl_fast.errors import ConfigError
from pcl_fast.models.peers import PeerNetwork
from pcl_fast.models.split import NO_TRUNK
from pcl_fast.models.zoo import Backbone, find_backbone

MODEL = "model.safetensors"


def load_teacher(config: Config) -> PeerNetwork:
    """The network that `--kd.teacher` names, whole, on the CPU, in eval mode and without gradients.

    ConfigError if it is missing, cannot be read, or is not of as many classes.
    """
    given = config.kd.teacher
    if given is None:
        raise ConfigError("--kd.teacher is missing: give the folder of a finished run")
    path = _file(given)
    model, tensors = _read(path)
    with torch.random.fork_rng(devices=[]):
        network = PeerNetwork(find_backbone(model, NO_TRUNK), config.data.classes, 1, ensemble=False)
    try:
        network.load_deployed(tensors)
    except (KeyError, RuntimeError):
        raise ConfigError(
            f"--kd.teacher {path}: is no {model} for {config.data.classes} classes; give a teacher that was "
            "trained on the same data set"
        ) from None
    return network.eval().requires_grad_(False)


def teacher_backbone(config: Config) -> Backbone:
    """The plain network of the teacher that `--kd.teacher` names, or of the one to be trained first."""
    path = None if config.kd.teacher is None else _file(config.kd.teacher)
    later = config.kd.teacher_model or config.model
    return find_backbone(later if path is None or not path.exists() else _read(path)[0], NO_TRUNK)


def _file(given: Path) -> Path:
    return given / MODEL if given.is_dir() else given


def _read(path: Path) -> tuple[str, dict[str, Tensor]]:
    """The name of a network, and its tensors."""
    if not path.is_file():
        raise ConfigError(
            f"--kd.teacher {path}: not there; give the folder of a finished run, or leave it out to train a "
            "teacher first"
        )
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            return about["model"], {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError) as error:
        raise ConfigError(f"--kd.teacher {path}: not a network of a run ({error})") from None
