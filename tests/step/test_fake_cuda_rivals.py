"""A step of every rival on a CUDA device that is only pretended: it asks the host for nothing."""

import dataclasses
from typing import Any

import pytest

from pcl_fast.config import Config
from pcl_fast.objectives import METHODS
from pcl_fast.step.obstacles import find_obstacle
from tests.step import test_fake_cuda
from tests.step.test_fake_cuda import fake_cuda, make_step, strays_of

__all__ = ["fake_cuda"]  # a fixture

CASES: dict[str, dict[str, Any]] = {
    **{method: {} for method in METHODS if method not in ("pcl", "vanilla", "kd")},
    "dml of branches": {"separate": False},
    "kdcl naive": {"target": "naive"},
    "kdcl linear": {"target": "linear"},
    "kdcl general": {"target": "general"},
}


@pytest.mark.usefixtures("fake_cuda")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("case", CASES)
def test_forward_loss_and_update_stay_on_the_device(
    case: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = case.split(maxsplit=1)[0]
    usual = test_fake_cuda.tiny_config

    def changed(*args: Any, **pcl: Any) -> Config:
        config = usual(*args, **pcl)
        options = dataclasses.replace(getattr(config, method), **CASES[case])
        return dataclasses.replace(config, **{method: options})

    monkeypatch.setattr(test_fake_cuda, "tiny_config", changed)
    step = make_step(method=method, dtype=dtype)
    assert bool(step.state.arena.student_half) == (dtype == "bfloat16")
    strays: list[str] = []
    assert find_obstacle(lambda: strays.extend(strays_of(step))) is None
    assert strays == []
