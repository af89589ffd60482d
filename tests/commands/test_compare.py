"""What a comparison makes of several seeds."""

import io

import numpy as np
import pytest
from rich.console import Console

from pcl_fast.commands.compare import comparison_table, summarise

FINALS = {"vanilla": [70.0, 71.5, 70.9], "PCL": [72.1, 73.0, 71.0], "PCL-E": [73.0, 74.0, 75.0]}


def test_mean_and_sample_deviation_over_the_seeds() -> None:
    summary = summarise(FINALS)
    assert list(summary) == list(FINALS)
    for name, values in FINALS.items():
        assert summary[name]["top1"] == values
        assert summary[name]["mean"] == pytest.approx(np.mean(values), rel=1e-12)
        assert summary[name]["std"] == pytest.approx(np.std(values, ddof=1), rel=1e-12)


def test_one_seed_has_no_deviation() -> None:
    assert summarise({"vanilla": [70.0]}) == {"vanilla": {"top1": [70.0], "mean": 70.0, "std": None}}


def test_the_table_shows_every_seed_and_the_honest_difference() -> None:
    out = io.StringIO()
    lost = FINALS | {"PCL": [69.0, 70.0, 71.0]}
    Console(file=out, width=120).print(comparison_table(summarise(lost), epochs=40))
    rows = {
        line.split("│")[1].strip(): line.split("│")[2:-1]
        for line in out.getvalue().splitlines()
        if "│" in line
    }
    assert [cell.strip() for cell in rows["vanilla"]] == ["70.80", "0.75", "70.00  71.50  70.90", ""]
    assert [cell.strip() for cell in rows["PCL"]] == ["70.00", "1.00", "69.00  70.00  71.00", "-0.80"]
    assert [cell.strip() for cell in rows["PCL-E"]] == ["74.00", "1.00", "73.00  74.00  75.00", "+3.20"]
    assert "after the last of 40 epochs" in out.getvalue()
