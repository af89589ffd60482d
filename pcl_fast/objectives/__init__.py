"""Training methods over the multi-branch network, one file each; `make_objective` picks one."""

from collections.abc import Callable

from pcl_fast.config import Config
from pcl_fast.errors import ConfigError, did_you_mean
from pcl_fast.objectives.base import Deployment, Loss, Objective
from pcl_fast.objectives.cl import CollaborativeLearning
from pcl_fast.objectives.dml import MutualLearning
from pcl_fast.objectives.ffl import FeatureFusion
from pcl_fast.objectives.kd import Distillation
from pcl_fast.objectives.kdcl import Kdcl
from pcl_fast.objectives.okddip import DiversePeers
from pcl_fast.objectives.one import NativeEnsemble
from pcl_fast.objectives.pcl import Pcl
from pcl_fast.objectives.vanilla import Vanilla

__all__ = ["METHODS", "Deployment", "Loss", "Objective", "make_objective"]

METHODS: dict[str, Callable[[Config], Objective]] = {
    "vanilla": lambda _: Vanilla(),
    "kd": lambda config: Distillation(config.kd),
    "dml": lambda config: MutualLearning(config.dml),
    "cl": lambda config: CollaborativeLearning(config.cl),
    "one": lambda config: NativeEnsemble(config.one),
    "okddip": lambda config: DiversePeers(config.okddip),
    "ffl": lambda config: FeatureFusion(config.ffl),
    "kdcl": lambda config: Kdcl(config.kdcl),
    "pcl": lambda config: Pcl(config.pcl),
}
"""Each method by the name that `--method` gives; a new one is a file and a line here."""


def make_objective(config: Config) -> Objective:
    """The objective that `config.method` names, with its options; ConfigError if there is none."""
    make = METHODS.get(config.method)
    if make is None:
        hint = did_you_mean(config.method, METHODS) or f" There are: {', '.join(METHODS)}."
        raise ConfigError(f"--method {config.method}: unknown.{hint}")
    return make(config)
