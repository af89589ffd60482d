"""Shares and verdicts, of costs that are known."""

import pytest

from pcl_fast.profile.loading import DECODE_ALONE, Contender, Loader, Sample
from pcl_fast.profile.verdict import shares, verdict


def of(
    cpu: dict[int, float], cores: float = 2.0, decodes: int = 1, idle: float = 0.0
) -> dict[int, Contender]:
    """Contenders of so many seconds of processor time an image, by their views."""

    def never() -> Loader:
        raise AssertionError

    samples = {views: Sample(cores / seconds, cores, idle, 0, 0.0) for views, seconds in cpu.items()}
    return {
        views: Contender(views, never, decodes, samples=[sample] * 3) for views, sample in samples.items()
    }


def test_shares_are_those_that_made_the_times() -> None:
    """Decode 4 ms, each view 1 ms, handing over 2 ms."""
    found = shares(of({DECODE_ALONE: 4e-3, 1: 7e-3, 2: 8e-3, 4: 10e-3}))
    assert (found.decode, found.views, found.hand_over) == pytest.approx((0.4, 0.4, 0.2))
    found = shares(of({DECODE_ALONE: 4e-3, 4: 10e-3}))
    assert (found.decode, found.views, found.hand_over) == pytest.approx((0.4, 0.6, 0.0))


def test_a_decode_for_each_view_is_counted_so() -> None:
    """Decode 4 ms and 1 ms more, for each view, and handing over 1 ms."""
    seconds = {views: views * 5e-3 + 1e-3 for views in (1, 2, 3)}
    found = shares(of({DECODE_ALONE: 4e-3, **seconds}) | of({3: seconds[3]}, decodes=3))
    assert (found.decode, found.views, found.hand_over) == pytest.approx((12 / 16, 3 / 16, 1 / 16))


def test_noise_makes_no_shares_below_zero() -> None:
    found = shares(of({DECODE_ALONE: 5e-3, 1: 4.8e-3, 3: 5.3e-3}))
    assert min(found.decode, found.views, found.hand_over) >= 0
    assert found.decode + found.views + found.hand_over == pytest.approx(1)


def test_the_verdict_names_what_binds() -> None:
    decoding = {DECODE_ALONE: 4e-3, 1: 5e-3, 3: 7e-3}
    assert verdict(of(decoding), 2).startswith("2.0 of 2 cores busy: decoding binds (decoding 57%, ")
    views = {DECODE_ALONE: 1e-3, 1: 5e-3, 3: 13e-3}
    assert "making views binds" in verdict(of(views), 2)
    waiting = verdict(of(decoding, cores=1.0, idle=1.0), 2)
    assert waiting.startswith("1.0 of 2 cores busy: not the processor but waiting binds")
    shared = verdict(of(decoding, cores=1.0, idle=0.1), 2)
    assert shared.startswith("1.0 of 2 cores busy (0.9 with other programs): decoding binds")
    on_a_large_machine = verdict(of(decoding, cores=2.0, idle=60.0), 2)
    assert on_a_large_machine.startswith("2.0 of 2 cores busy: decoding binds")
