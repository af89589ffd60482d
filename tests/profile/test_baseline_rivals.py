"""The straightforward implementation of every rival: the same method as ours, another program."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from pcl_fast.build import build_state
from pcl_fast.contract import ViewBatch
from pcl_fast.objectives import METHODS
from pcl_fast.profile.baseline import BaselineStep, baseline_config
from pcl_fast.profile.variants import open_variant
from pcl_fast.step.train_step import train_step
from tests import tiny
from tests.step.tiny import make_batches, moment, tiny_config

OPTIONS: dict[str, dict[str, Any]] = {"ffl": {"fusion_weight_decay": 0.3}, "dml": {"num_peers": 2}}
RIVALS = [method for method in METHODS if method not in ("pcl", "vanilla")]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("teacher") / "run"
    tiny.train(folder, tiny.tiny_config(method="vanilla"))
    return folder


@pytest.mark.parametrize("method", RIVALS)
def test_losses_and_weights_are_those_of_our_step(method: str, teacher: Path) -> None:
    """In float64, over four steps; FFL's fusion decays far more than all else."""
    config = tiny_config()
    options = OPTIONS.get(method, {}) | ({"teacher": teacher} if method == "kd" else {})
    changed = dataclasses.replace(getattr(config, method), **options)
    config = dataclasses.replace(config, method=method, **{method: changed})
    state, baseline = build_state(config, torch.float64), BaselineStep(baseline_config(config))
    for network in (baseline.network, baseline.trained):
        if network is not None:
            network.double()
    for index, batch in enumerate(make_batches(4, views=state.objective.num_views), start=1):
        precise = ViewBatch(batch.views_VBCHW.double(), batch.labels_B, batch.sample_ids_B)
        ours, theirs = train_step(state, precise, moment(index)), baseline(precise, moment(index))
        torch.testing.assert_close(ours.terms.sum(), theirs, rtol=1e-10, atol=0)
    for ours, theirs in zip(state.network.parameters(), baseline.network.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", ["baseline", "baseline-amp", "eager"])
@pytest.mark.parametrize("method", ["dml", "one", "ffl", "kdcl"])
def test_each_variant_trains(method: str, name: str) -> None:
    config = dataclasses.replace(tiny_config("bfloat16"), method=method)
    variant = open_variant(name, config)
    assert variant.refused is None
    variant.warm_up(2)
    variant.check()
    assert variant.refused is None
    variant.close()
