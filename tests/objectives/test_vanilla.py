"""The network alone: cross-entropy and nothing else."""

import dataclasses

import torch
import torch.nn.functional as F

from pcl_fast.config import Config, PclConfig
from pcl_fast.objectives import make_objective
from pcl_fast.objectives.pcl import Pcl
from pcl_fast.objectives.vanilla import Vanilla
from tests.objectives.oracles import noise, said


def test_its_loss_is_cross_entropy_whatever_the_distillation_weight() -> None:
    z, labels = noise(1, 4, 7), torch.tensor([0, 6, 2, 2])
    for weight in (0.0, 1.0, 100.0):
        terms = Vanilla().terms(said(z), None, labels, weight)
        torch.testing.assert_close(terms, F.cross_entropy(z[0], labels)[None])


def test_the_method_picks_the_objective_and_its_options() -> None:
    config = Config(pcl=PclConfig(num_peers=5, view_per_peer=False))
    objective = make_objective(config)
    assert isinstance(objective, Pcl)
    assert (objective.num_peers, objective.num_views) == (5, 1)
    alone = make_objective(dataclasses.replace(config, method="vanilla"))
    assert isinstance(alone, Vanilla)
    assert (alone.num_peers, alone.num_views, alone.has_ensemble, alone.uses_mean_teacher) == (
        1,
        1,
        False,
        False,
    )
    assert alone.deployment.network == "student"
