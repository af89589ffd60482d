"""Steps as plain calls, and what is said of errors. Graphs themselves: tests/gpu."""

import pytest
import torch

from pcl_fast.step.capture import CapturedCalls, PlainCalls, first_line, make_calls


def test_plain_calls_are_made_once_each_in_order() -> None:
    made: list[str] = []
    calls = PlainCalls()
    for key in ("a", "a", "b"):
        calls.run([lambda: made.append("first"), lambda: made.append("second")], key)
    calls.run([], "none")
    calls.close()
    assert made == ["first", "second"] * 3


def test_an_error_of_a_plain_call_comes_through() -> None:
    with pytest.raises(IndexError):
        PlainCalls().run([[].clear, [].pop], "key")


def test_steps_are_plain_unless_captured() -> None:
    said: list[str] = []
    calls = make_calls("off", torch.device("cpu"), said.append, compiled=False)
    assert isinstance(calls, PlainCalls)
    assert not isinstance(calls, CapturedCalls)
    assert said == []


def raise_in_turn(messages: list[str], explicit: bool) -> None:
    """Raise the last; it is caught and the one before it raised, and so on, as errors of a capture are."""
    first, *inner = messages
    try:
        if inner:
            raise_in_turn(inner, explicit)
    except RuntimeError as error:
        if explicit:
            raise RuntimeError(first) from error
        raise RuntimeError(first) from None
    raise RuntimeError(first)


@pytest.mark.parametrize("explicit", [True, False])
def test_the_line_is_that_of_the_first_thing_that_went_wrong(explicit: bool) -> None:
    """Also where an error hides what it came of from tracebacks."""
    with pytest.raises(RuntimeError, match="invalidated") as caught:
        raise_in_turn(["capture was invalidated", "in backward", "operation not permitted\nmore"], explicit)
    assert first_line(caught.value) == "operation not permitted"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("one\ntwo"), "one"),
        (ValueError("\n  first words\nmore"), "first words"),
        (NotImplementedError(), "NotImplementedError"),
        (MemoryError("   "), "MemoryError"),
    ],
    ids=repr,
)
def test_an_error_says_its_first_line_or_at_least_its_name(error: Exception, line: str) -> None:
    assert first_line(error) == line


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_capturing_without_a_gpu_is_an_error_of_torch() -> None:
    """Configurations that ask for it are refused before."""
    with pytest.raises((RuntimeError, AssertionError)):
        make_calls("on", torch.device("cuda"), print, compiled=False)
