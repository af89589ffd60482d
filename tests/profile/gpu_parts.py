"""Parts of a GPU's measurements at tiny sizes; on the CPU Triton is interpreted."""

from functools import partial

import torch

from pcl_fast.commands.profile.gpu import JOBS
from pcl_fast.commands.profile.gpu_views import open_random
from pcl_fast.profile.gpu.bench import Bench, Row
from tests.conftest import HAS_GPU

DEVICE = torch.device("cuda" if HAS_GPU else "cpu")


def tiny_bench(rows: list[Row]) -> Bench:
    return Bench(
        device=DEVICE,
        add=rows.append,
        open_loader=partial(open_random, True),
        samples=2,
        seconds=0.0,
        tiny=True,
        left=60.0,
    )


def run_tiny(name: str) -> list[Row]:
    """The rows of a part, none of which may have failed; a CPU captures nothing."""
    rows: list[Row] = []
    JOBS[name].run(tiny_bench(rows))
    assert [row for row in rows if "failed" in row] == []
    refused = [row for row in rows if "refused" in row]
    assert HAS_GPU or {row["refused"] for row in refused} <= {"cpu has no CUDA graphs"}
    assert not HAS_GPU or refused == []
    for row in rows:
        for key, values in row.items():
            if key.endswith("seconds") and isinstance(values, list):
                assert len(values) == 2, (row, key)
                assert all(0 < value < 60 for value in values), (row, key)
    return [row for row in rows if "refused" not in row]
