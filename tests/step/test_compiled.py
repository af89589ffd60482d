"""Compiled where that works; where it does not, the same results, and once a word why."""

import dataclasses
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._inductor.config as inductor
from torch import Tensor

from pcl_fast.build import build_state
from pcl_fast.step.compiled import Compiled
from pcl_fast.step.train_step import train_step
from tests.step.tiny import make_batches, moment, tiny_config

pytestmark = pytest.mark.timeout(180)  # a compiler's work, on a busy machine
X = torch.linspace(-2, 2, 35).view(5, 7)


def wave(x: Tensor) -> Tensor:
    """Something of several operations that says by its value who ran it."""
    return (x.sin() * 2).relu() + (10.0 if torch.compiler.is_compiling() else 20.0)


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler here")
def test_a_compiled_function_equals_the_eager_one_with_its_gradient(said: list[str]) -> None:
    torch.compiler.reset()
    compiled = Compiled(wave, said.append)
    inputs = [X.clone().requires_grad_() for _ in range(2)]
    out, expected = compiled(inputs[0]), wave(inputs[1])
    torch.testing.assert_close(out, expected - 10)
    for result in (out, expected):
        result.square().sum().backward()
    ours, theirs = (x.grad for x in inputs)
    # d (f + c)^2 = 2 (f + c) f': the constants differ.
    factor = out.detach() / expected.detach()
    torch.testing.assert_close(ours, theirs * factor)  # pyright: ignore[reportOptionalOperand]
    assert said == []


def no_compiler() -> Any:
    """Inductor's settings on a machine without a C++ compiler."""
    return inductor.patch({"cpp.cxx": ("no-such-compiler",), "fx_graph_cache": False})


def refusing(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile with a backend that breaks."""

    def backend(graph: Any, inputs: Any) -> Any:
        raise NotImplementedError("no such operator on this machine\nand more lines")

    return compile_with(function, backend=backend)


compile_with = torch.compile


def test_a_backend_that_breaks_is_said_once_and_left(
    said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", refusing)
    compiled = Compiled(wave, said.append)
    for _ in range(2):
        assert torch.equal(compiled(X), wave(X))
    assert said == ["the network cannot be compiled (no such operator on this machine); it runs eager"]


def test_a_machine_without_a_compiler_runs_eager(said: list[str]) -> None:
    torch.compiler.reset()
    with no_compiler():
        assert torch.equal(Compiled(wave, said.append)(X), wave(X))
    (message,) = said
    assert message.startswith("the network cannot be compiled (No working C++ compiler found")
    assert message.endswith("; it runs eager")
    assert "\n" not in message


def test_what_dynamo_cannot_trace_runs_eager(said: list[str]) -> None:
    """An operator of a user's that has no shapes without values."""

    @torch.library.custom_op("pcl_fast_tests::twice", mutates_args=())
    def twice(x: Tensor) -> Tensor:
        return x * 2

    torch.compiler.reset()
    assert torch.equal(Compiled(lambda x: twice(x) + 1, said.append)(X), X * 2 + 1)
    (message,) = said
    assert "There was no fake impl registered" in message


def test_an_error_of_the_function_is_no_reason_to_run_it_again(said: list[str]) -> None:
    calls: list[int] = []

    def wrong(x: Tensor) -> Tensor:
        calls.append(1)
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        Compiled(wrong, said.append)(X)
    assert said == []
    assert len(calls) == 1


def test_a_step_goes_on_eager_where_its_network_cannot_be_compiled(
    said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(tiny_config(), method="vanilla")
    plain = build_state(config)
    monkeypatch.setattr(torch, "compile", refusing)
    ours = build_state(dataclasses.replace(config, compile=True), say=said.append)
    for step, batch in enumerate(make_batches(2, views=1), start=1):
        found, expected = (train_step(state, batch, moment(step)) for state in (ours, plain))
        assert torch.equal(found.terms, expected.terms)
    assert len(said) == 1
    assert torch.equal(ours.arena.buffers.values, plain.arena.buffers.values)
