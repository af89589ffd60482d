"""Every rival, several backbones and regularisation are captured, and compute what they do uncaptured."""

from pathlib import Path
from typing import Any

import pytest

from pcl_fast.objectives import METHODS
from tests.gpu.captured import BATCH, assert_same, config_of, graphs, run

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

KINDS: dict[str, dict[str, Any]] = {
    **{method: {"method": method} for method in METHODS if method not in ("pcl", "vanilla")},
    "dml of branches": {"method": "dml", "dml": {"separate": False}},
    "kdcl naive": {"method": "kdcl", "kdcl": {"target": "naive"}},
    "kdcl linear": {"method": "kdcl", "kdcl": {"target": "linear"}},
    "kdcl general": {"method": "kdcl", "kdcl": {"target": "general"}, "data": {"hold_out": BATCH}},
    "two backbones": {"model": "resnet8,resnet20"},
    "separate backbones": {"model": "resnet8,densenet40_12", "split": "none"},
    "mixup and soft labels": {"train": {"mixup": 0.4, "label_smoothing": 0.1}},
}


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_captured_and_the_same_as_uncaptured(tmp_path: Path, kind: str) -> None:
    """Ten steps: three plain ones, a capture, replays over the end of an epoch."""
    changes = dict(KINDS[kind])
    if kind == "kd":
        teacher = tmp_path / "teacher"
        run(teacher, config_of("off", "bfloat16", epochs=1, method="vanilla"), 5 * BATCH)
        changes["kd"] = {"teacher": teacher}
    images = 5 * BATCH + changes.get("data", {}).get("hold_out", 0)
    for capture in ("on", "off"):
        config = config_of(capture, "bfloat16", epochs=2, **changes)
        assert graphs(run(tmp_path / capture, config, images)) == (capture == "on")
    assert_same(tmp_path / "on", tmp_path / "off")
