"""Training methods over the multi-branch network, one file each; `make_objective` picks one."""

from pcl_fast.config import Config
from pcl_fast.objectives.base import Deployment, Loss, Objective
from pcl_fast.objectives.pcl import Pcl
from pcl_fast.objectives.vanilla import Vanilla

__all__ = ["Deployment", "Loss", "Objective", "make_objective"]


def make_objective(config: Config) -> Objective:
    """The objective that `config.method` names, with its options."""
    return Pcl(config.pcl) if config.method == "pcl" else Vanilla()
