"""The finite check, alone: what it latches, what it says, and what it never does."""

import pytest
import torch

from pcl_fast.errors import DivergedError
from pcl_fast.guard import FiniteGuard

NAMES = ("ce/peer1", "ce/ensemble", "gradient norm")


def make_guard() -> FiniteGuard:
    return FiniteGuard(NAMES, torch.device("cpu"))


def test_finite_values_pass() -> None:
    guard = make_guard()
    largest = torch.finfo(torch.float32).max
    for step in (1, 2, 3):
        assert guard.watch([torch.tensor([0.0, -largest, largest])], step).item() == 0
    guard.check()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", range(3))
def test_the_step_and_the_name_of_a_bad_value_are_said(place: int, value: float) -> None:
    guard = make_guard()
    guard.watch([torch.ones(3)], 41)
    values = torch.ones(3)
    values[place] = value
    assert guard.watch([values], 42).item() == 1
    with pytest.raises(DivergedError, match=rf"^step 42: not finite: {NAMES[place]}; the weights are those"):
        guard.check()


def test_several_bad_values_are_all_named_with_the_fix() -> None:
    guard = make_guard()
    guard.watch([torch.tensor([float("nan"), 1.0, float("inf")])], 3)
    with pytest.raises(DivergedError, match=r"ce/peer1, gradient norm;.*--optim\.lr.*--amp\.dtype float32"):
        guard.check()


def test_the_first_bad_step_is_kept_whatever_comes_after() -> None:
    guard = make_guard()
    guard.watch([torch.tensor([1.0, float("nan"), 1.0])], 5)
    assert guard.watch([torch.ones(3)], 6).item() == 1
    assert guard.watch([torch.tensor([float("nan"), 1.0, 1.0])], 7).item() == 1
    with pytest.raises(DivergedError, match=r"^step 5: not finite: ce/ensemble;"):
        guard.check()


def test_the_answer_is_a_scalar_for_the_update() -> None:
    """A float32 scalar on the device; and watching keeps no graph alive."""
    values = torch.ones(3, requires_grad=True)
    stop = make_guard().watch([values * 2], 1)
    assert (stop.dtype, stop.shape, stop.requires_grad) == (torch.float32, torch.Size([]), False)
