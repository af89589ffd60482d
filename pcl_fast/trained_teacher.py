"""A network that a finished run has left, to teach another one."""

from pathlib import Path

import torch

from pcl_fast.config import Config
from pcl_fast.errors import ConfigError, DataError
from pcl_fast.models.peers import PeerNetwork
from pcl_fast.models.split import NO_TRUNK
from pcl_fast.models.zoo import Backbone, find_backbone
from pcl_fast.run_network import RunNetwork, network_file, read_network


def load_teacher(config: Config) -> PeerNetwork:
    """The network that `--kd.teacher` names, whole, on the CPU, in eval mode and without gradients.

    ConfigError if it is missing, cannot be read, or is not of as many classes.
    """
    given = config.kd.teacher
    if given is None:
        raise ConfigError("--kd.teacher is missing: give the folder of a finished run")
    found = _read(given)
    with torch.random.fork_rng(devices=[]):
        network = PeerNetwork(find_backbone(found.model, NO_TRUNK), config.data.classes, 1, ensemble=False)
    try:
        network.load_deployed(found.tensors)
    except (KeyError, RuntimeError):
        raise ConfigError(
            f"--kd.teacher {found.path}: is no {found.model} for {config.data.classes} classes; give a "
            "teacher that was trained on the same data set"
        ) from None
    return network.eval().requires_grad_(False)


def teacher_backbone(config: Config) -> Backbone:
    """The plain network of the teacher that `--kd.teacher` names, or of the one to be trained first."""
    given = config.kd.teacher
    if given is not None and network_file(given).exists():
        return find_backbone(_read(given).model, NO_TRUNK)
    return find_backbone(config.kd.teacher_model or config.model, NO_TRUNK)


def _read(given: Path) -> RunNetwork:
    fix = "give the folder of a finished run, or leave it out to train a teacher first"
    try:
        return read_network(given, "--kd.teacher", fix)
    except DataError as error:  # another one is as good
        raise ConfigError(str(error)) from None
