"""Which kernels a configuration gets."""

from typing import Any

import pytest
import torch

from pcl_fast import kernels, native
from pcl_fast.build import build_network, describe_kernels
from pcl_fast.config import AmpConfig, Config
from pcl_fast.device import resolve
from pcl_fast.models.view_norm import ViewBatchNorm2d
from pcl_fast.objectives import make_objective


def config_with(**changes: Any) -> Config:
    return resolve(Config(model="resnet8", device="cpu", amp=AmpConfig(dtype="bfloat16"), **changes))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, None),
        ({"kernels": "off"}, "torch's"),
        ({"channels_last": "off"}, "torch's"),
        ({"compile": True}, "torch.compile's"),
    ],
    ids=str,
)
def test_the_network_uses_the_kernels_that_are_announced(changes: dict[str, Any], said: str | None) -> None:
    config = config_with(**changes)
    network = build_network(config, make_objective(config))
    norms = [layer for layer in network.modules() if isinstance(layer, ViewBatchNorm2d)]
    assert {layer.use_kernels for layer in norms} == {said is None}
    assert any(layer.conv is not None for layer in norms) == (said is None)
    assert describe_kernels(config) == (said or kernels.describe(torch.device("cpu")))


def test_a_cache_folder_that_cannot_be_written_is_a_reason_not_an_error(tmp_path, monkeypatch) -> None:
    blocked = tmp_path / "file"
    blocked.touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    native.load.cache_clear()
    native.why_unavailable.cache_clear()
    try:
        reason = native.why_unavailable(kernels.norm_act.SOURCE)
    finally:
        native.load.cache_clear()
        native.why_unavailable.cache_clear()
    assert reason is not None
    assert reason.startswith("norm_act: ")
    assert str(blocked) in reason
