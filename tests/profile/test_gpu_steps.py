"""Parts that make whole steps, at tiny sizes."""

from pcl_fast.profile.gpu.bench import UNKNOWN
from tests.conftest import HAS_GPU
from tests.profile.gpu_parts import run_tiny


def test_steps_of_the_paper_row() -> None:
    rows = run_tiny("paper-row")
    best = "captured" if HAS_GPU else "eager"
    steps = [(row["mode"], row["method"], row["augmented"]) for row in rows if row["what"] == "step"]
    assert set(steps) >= {(best, "pcl", False), (best, "pcl", True), (best, "vanilla", False)}
    assert set(steps) >= {("baseline", "pcl", False), ("baseline-amp", "pcl", False)}
    (floor,) = (row for row in rows if row["what"] == "floor")
    assert floor["ceilings"]["name"] == UNKNOWN.name
    assert 0 < floor["floor_seconds"]["ideal"] <= floor["floor_seconds"]["fused"]


def test_steps_of_imagenet() -> None:
    rows = run_tiny("imagenet")
    assert {row["model"] for row in rows} == {"resnet18"}
    assert {row["what"] for row in rows} == {"step", "floor"}


def test_choices_seeds_and_shares() -> None:
    assert [row["runs"] for row in run_tiny("seeds")] == [1, 2, 3]
    assert len(run_tiny("choices")) == 6
    (share,) = run_tiny("update-share")
    assert share["seconds"][0] < share["step_seconds"][0]


def test_counts() -> None:
    rows = run_tiny("counts")
    assert {"baseline", "baseline-amp", "eager"} <= {row["mode"] for row in rows}
    assert all(row["launches"] > 10 for row in rows if row["mode"] != "captured")
