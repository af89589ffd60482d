"""A thousand captured steps against a thousand eager ones in plain float32: the same curves of the loss."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pcl_fast.sinks import Record, read_records
from tests.gpu.captured import BATCH, config_of, graphs, run

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]
EPOCHS, IMAGES = 4, 250 * BATCH
# How far means over 50 steps may be apart, at most and on average; of the distillation losses as shares of
# their largest. Between float32 and bfloat16 on a CPU they are 2 % and 4 %, on average 0.5 % and 1 %.
BANDS = {"": (0.05, 0.01), "ce": (0.05, 0.01), "pe": (0.10, 0.03), "pm": (0.10, 0.03)}


def curve(path: Path, capture: str, dtype: str, **changes: Any) -> list[Record]:
    """The records of a run with everything in it: ramp-up, rising EMA coefficient, two milestones."""
    pcl = {"num_peers": 3, "ema_decay": 0.99, "rampup_epochs": 2.0} | changes.pop("pcl", {})
    train = {"log_every": 50, "eval_every": EPOCHS}
    options: dict[str, Any] = {"optim": {"lr": 0.02}, "train": train, "pcl": pcl, "deterministic": False}
    config = config_of(capture, dtype, EPOCHS, **options, **changes)
    assert graphs(run(path, config, IMAGES)) == (capture == "on")
    return read_records(path / "metrics.jsonl")


def means(records: list[Record], terms: str) -> torch.Tensor:
    """The mean over each 50 steps of all terms that begin so, added up."""
    steps = [record["terms"] for record in records if record["kind"] == "step"]
    assert len(steps) == 20
    return torch.tensor([sum(row[name] for name in row if name.startswith(terms)) for row in steps])


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    """Eager float32, without TF32 and kernels of ours, view by view."""
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        path = tmp_path_factory.mktemp("reference")
        return curve(path, "off", "float32", kernels="off", pcl={"trunk_views": "loop"})
    finally:
        torch.backends.cudnn.allow_tf32 = allowed


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_thousand_replays_learn_as_eager_float32_does(
    tmp_path: Path, reference: list[Record], dtype: str
) -> None:
    found = curve(tmp_path, "on", dtype)
    for terms, (most, on_average) in BANDS.items():
        ours, theirs = means(found, terms), means(reference, terms)
        distance = (ours - theirs).abs() / (theirs if terms in ("", "ce") else theirs.max())
        assert distance.max() < most, (terms, ours, theirs)
        assert distance.mean() < on_average, (terms, ours, theirs)
    assert means(found, "ce")[-1] < 0.75 * means(found, "ce")[0], "nothing was learnt"
    for head, accuracy in reference[-1]["val"].items():
        assert found[-1]["val"][head]["loss"] == pytest.approx(accuracy["loss"], rel=0.05), head
