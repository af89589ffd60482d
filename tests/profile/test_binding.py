"""What binds training, of rates that are known."""

import pytest

from pcl_fast.profile.binding import Rates, binding

SHARED = "bound by what training and loading share (cores, memory, the bus): the GPU waits "


@pytest.mark.parametrize(
    ("end_to_end", "compute", "data", "line"),
    [
        (
            997,
            1000,
            4100,
            "compute-bound: the GPU waits for data 0.3 % of the time; data could go 4.1x faster",
        ),
        (
            1010,
            1000,
            2000,
            "compute-bound: the GPU waits for data 0.0 % of the time; data could go 2.0x faster",
        ),
        (
            980,
            1000,
            1050,
            "balanced: the GPU waits for data 2.0 % of the time; data go 1.05x as fast as it computes",
        ),
        (
            960,
            1000,
            970,
            "balanced: the GPU waits for data 4.0 % of the time; data go 0.97x as fast as it computes",
        ),
        (
            395,
            1000,
            400,
            "data-bound: the GPU waits for data 60 % of the time; with data that keep up it could ",
        ),
        (
            910,
            1000,
            980,
            "data-bound: the GPU waits for data 9.0 % of the time; with data that keep up it could ",
        ),
        (500, 1000, 1500, SHARED + "50 % of the time; alone, training goes 2.0x and data 3.0x as fast"),
        (300, 900, 600, SHARED + "67 % of the time; alone, training goes 3.0x and data 2.0x as fast"),
    ],
)
def test_the_line_names_what_binds(end_to_end: float, compute: float, data: float, line: str) -> None:
    found = binding(Rates(end_to_end, compute, data), "GPU")
    assert found.startswith(line)
    assert found.endswith(
        {"bal": " and bind next", "dat": f"train {compute / end_to_end:.1f}x faster"}.get(line[:3], "")
    )


def test_the_device_is_named() -> None:
    assert "the CPU waits" in binding(Rates(1, 1, 9), "CPU")
    assert "the CPU waits" in binding(Rates(1, 2, 9), "CPU")


def test_waiting_is_a_share() -> None:
    assert Rates(75, 100, 80).waiting == 0.25
    assert Rates(101, 100, 200).waiting == 0
    assert Rates(75, 100, 80).headroom == 0.8
