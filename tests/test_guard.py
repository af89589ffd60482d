"""The guards, alone: what they latch, what they say, and what they never do."""

import itertools
import math
import random
import statistics
from collections import deque
from collections.abc import Iterable
from typing import Any

import pytest
import torch

from pcl_fast.errors import DivergedError
from pcl_fast.guard import FiniteGuard, SpikeGuard
from pcl_fast.step.obstacles import find_obstacle

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


def make_spikes(factor: float = 4.0, at_most: int = 3) -> SpikeGuard:
    return SpikeGuard(factor, at_most, torch.device("cpu"))


def watched(guard: SpikeGuard, norms: Iterable[float]) -> list[float]:
    return [guard.watch(torch.tensor(norm)).item() for norm in norms]


def by_hand(norms: Iterable[float], factor: float = 4.0, at_most: int = 3) -> list[float]:
    """The same in plain Python."""
    recent: deque[float] = deque(maxlen=101)
    said: list[float] = []
    row = 0
    for norm in norms:
        if not math.isfinite(norm):
            said.append(0.0)
            continue
        spike = len(recent) >= 20 and norm > factor * statistics.median(recent)
        skip = spike and row < at_most
        row = row + 1 if spike else 0
        if not skip:
            recent.append(norm)
        said.append(float(skip))
    return said


def in_float32(norms: Iterable[float]) -> list[float]:
    return torch.tensor(list(norms)).tolist()


def jumpy(steps: int, draws: random.Random) -> list[float]:
    """A level that drifts, with spikes alone and in bursts, and values that are not finite."""
    norms: list[float] = []
    while len(norms) < steps:
        level = math.exp(draws.gauss(len(norms) / 200, 0.4))
        kind = draws.random()
        if kind < 0.05:
            norms += [level * draws.uniform(3, 100) for _ in range(draws.randint(1, 7))]
        elif kind < 0.08:
            norms.append(draws.choice([math.nan, math.inf]))
        else:
            norms.append(level)
    return in_float32(norms[:steps])


@pytest.mark.parametrize(("factor", "at_most"), [(4.0, 3), (2.0, 1), (1.5, 5), (10.0, 2)])
def test_spikes_are_those_of_the_running_median(factor: float, at_most: int) -> None:
    norms = jumpy(500, random.Random(int(factor * 10)))
    guard = make_spikes(factor, at_most)
    said, expected = watched(guard, norms), by_hand(norms, factor, at_most)
    assert said == expected
    assert guard.skipped.item() == sum(expected)
    skipped_rows = [sum(row) for key, row in itertools.groupby(said) if key]
    assert max(skipped_rows) == at_most


def test_nothing_is_a_spike_before_twenty_norms() -> None:
    assert watched(make_spikes(), [*[1.0] * 18, 1e9, 1.0, 1e9]) == [0.0] * 20 + [1.0]
    assert watched(make_spikes(), [*[1.0] * 19, math.nan, math.inf, 1e9]) == [0.0] * 22, "19 are finite"


def test_a_norm_at_the_limit_is_no_spike() -> None:
    """The median of an even number is the mean of the middle two: 2; and 4 times 2 is 8."""
    level = [1.0, 3.0] * 10
    assert watched(make_spikes(), [*level, 8.0])[-1] == 0
    assert watched(make_spikes(), [*level, 8.001])[-1] == 1


def test_a_new_level_is_let_through_and_learned() -> None:
    guard = make_spikes()
    assert watched(guard, [1.0] * 101) == [0.0] * 101
    assert watched(guard, [50.0] * 51) == [1.0] * 3 + [0.0] * 48
    assert watched(guard, [1.0, 50.0]) == [0.0, 1.0], "48 of 101: the old level is still the usual one"
    assert watched(guard, [50.0] * 5 + [1.0]) == [1.0] * 2 + [0.0] * 4
    assert watched(guard, [50.0] * 5) == [0.0] * 5, "51 of 101"
    assert guard.skipped.item() == 6


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_not_its_business(value: float) -> None:
    guard, other = make_spikes(), make_spikes()
    level = [1.0 + 0.01 * step for step in range(30)]
    watched(guard, level)
    watched(other, level)
    assert watched(guard, [value]) == [0.0]
    assert all(torch.equal(one, two) for one, two in zip(state(guard), state(other), strict=True))
    watched(guard, [90.0] * 2)
    watched(other, [90.0] * 2)
    assert watched(guard, [value, 90.0, 90.0]) == [0.0, 1.0, 0.0], "nor does it end a row of spikes"
    assert watched(other, [90.0, 90.0]) == [1.0, 0.0]


def state(guard: SpikeGuard) -> list[torch.Tensor]:
    return list(guard.state_dict().values())


@pytest.mark.parametrize("stop", [1, 19, 20, 60, 150, 260])
def test_it_goes_on_from_its_state_as_if_nothing_had_happened(stop: int) -> None:
    norms = jumpy(300, random.Random(7))
    first, second = make_spikes(), make_spikes()
    said = watched(first, norms[:stop])
    saved = first.state_dict()
    before = [tensor.data_ptr() for tensor in vars(second).values() if isinstance(tensor, torch.Tensor)]
    second.load_state_dict(saved)
    after = [tensor.data_ptr() for tensor in vars(second).values() if isinstance(tensor, torch.Tensor)]
    assert after == before, "a graph has these places"
    watched(first, norms[stop:])
    assert said + watched(second, norms[stop:]) == by_hand(norms)
    assert all(torch.equal(one, two) for one, two in zip(state(first), state(second), strict=True))
    assert int(saved["skipped"]) == sum(by_hand(norms[:stop])), "the saved copy stays as it was"


def test_a_graph_can_hold_it() -> None:
    """No value is fetched from the device, and no shape depends on one; the answer is a scalar there."""
    guard = make_spikes()
    answers: list[Any] = []
    norm = torch.tensor(2.0, requires_grad=True)
    assert find_obstacle(lambda: answers.append(guard.watch(norm * 2))) is None
    stop = answers[0]
    assert (stop.dtype, stop.shape, stop.requires_grad) == (torch.float32, torch.Size([]), False)


@pytest.mark.gpu
def test_a_captured_guard_says_the_same() -> None:
    norms = jumpy(300, random.Random(3))
    device = torch.device("cuda")
    guard = SpikeGuard(4.0, 3, device)
    norm, graph = torch.zeros((), device=device), torch.cuda.CUDAGraph()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        SpikeGuard(4.0, 3, device).watch(norm)  # libraries load their kernels
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        stop = guard.watch(norm)
    said: list[float] = []
    for value in norms:
        norm.fill_(value)
        graph.replay()
        said.append(stop.item())
    assert said == by_hand(norms)
