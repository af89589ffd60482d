"""The expected calibration error against a loop over images, and by hand."""

import math

import pytest
import torch
from torch import Tensor

from pcl_fast.calibration import BINS, calibration_error, calibration_gaps


def by_loop(confidences: list[float], hits: list[bool]) -> float:
    """Guo et al. 2017, eq. 3, as it stands: sum_m |B_m| / n |acc(B_m) - conf(B_m)|, in percent."""
    bins: list[list[tuple[float, bool]]] = [[] for _ in range(15)]
    for confidence, hit in zip(confidences, hits, strict=True):
        number = next(m for m in range(15) if confidence <= (m + 1) / 15 or m == 14)
        bins[number].append((confidence, hit))
    error = 0.0
    for within in bins:
        if within:
            accuracy = sum(hit for _, hit in within) / len(within)
            confidence = sum(confidence for confidence, _ in within) / len(within)
            error += len(within) / len(hits) * abs(accuracy - confidence)
    return 100 * error


def measure(confidence_HB: Tensor, hits_HB: Tensor) -> list[float]:
    gaps_HN = calibration_gaps(confidence_HB, hits_HB)
    assert gaps_HN.shape == (len(hits_HB), BINS)
    return [calibration_error(gaps, hits_HB.shape[1]) for gaps in gaps_HN.tolist()]


def test_it_equals_a_loop_over_images() -> None:
    confidence_HB = torch.rand(4, 999, dtype=torch.float64)
    hits_HB = torch.rand(4, 999) < confidence_HB**2  # too sure of itself
    expected = [by_loop(*each) for each in zip(confidence_HB.tolist(), hits_HB.tolist(), strict=True)]
    assert measure(confidence_HB, hits_HB) == pytest.approx(expected, rel=1e-12)
    assert all(5 < each < 30 for each in expected)


def test_a_bin_has_its_upper_edge() -> None:
    third = 5 / 15
    above = math.nextafter(third, 1)
    gaps = calibration_gaps(
        torch.tensor([[third, above, 1.0, 0.0]], dtype=torch.float64), torch.ones(1, 4) > 0
    )
    places = [number for number, gap in enumerate(gaps[0].tolist()) if gap]
    assert places == [0, 4, 5]
    assert gaps[0, 4] == pytest.approx(1 - third)
    assert gaps[0, 14] == 0, "sure and right"


def test_sure_and_wrong_is_as_bad_as_can_be() -> None:
    assert measure(torch.ones(1, 7), torch.zeros(1, 7) > 0) == [100.0]


def test_within_a_bin_errors_cancel_and_between_bins_they_do_not() -> None:
    one_bin = torch.tensor([[0.5, 0.5]], dtype=torch.float64)
    two_bins = torch.tensor([[0.75, 0.25]], dtype=torch.float64)
    hits = torch.tensor([[True, False]])
    assert measure(one_bin, hits) == [0.0]
    assert measure(two_bins, hits) == [25.0]


def test_batches_add_up() -> None:
    confidence_HB, hits_HB = torch.rand(2, 100), torch.rand(2, 100) > 0.5
    parts = [calibration_gaps(confidence_HB[:, at], hits_HB[:, at]) for at in (slice(0, 33), slice(33, None))]
    torch.testing.assert_close(parts[0] + parts[1], calibration_gaps(confidence_HB, hits_HB))
