"""What no graph can hold is found, and named with its line; a step has nothing of it."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pcl_fast.build import build_state
from pcl_fast.step.obstacles import find_obstacle
from pcl_fast.step.state import TrainState
from tests.step.tiny import equal, make_batches, parameters, tiny_config, tiny_state, train

X, COUNTS, META = torch.linspace(-1, 1, 12), torch.tensor([1, 2, 2]), torch.ones(3, device="meta")
READ = "reads a number from the device"
SIZE = "makes a tensor whose size depends on values"
MASK = "picks by a mask, of as many elements as that has true values"
COMPARE = "compares on the host"
COPY = "copies between cpu and meta"  # a device without values stands for a GPU

OBSTACLES: dict[str, tuple[Callable[[], object], str]] = {
    "item": (lambda: X.sum().item(), f"aten._local_scalar_dense {READ}"),
    "float": (lambda: float(X[3]), f"aten._local_scalar_dense {READ}"),
    "if": (lambda: 1 if X.any() else 0, f"aten._local_scalar_dense {READ}"),
    "an index that is a tensor": (lambda: X[torch.tensor(3) :], f"aten._local_scalar_dense {READ}"),
    "equal": (lambda: torch.equal(X, X), f"aten.equal {COMPARE}"),
    "allclose": (lambda: torch.allclose(X, X), f"aten.allclose {COMPARE}"),
    "nonzero": (lambda: X.nonzero(as_tuple=False), f"aten.nonzero {SIZE}"),
    "where": (lambda: torch.where(X > 0), f"aten.nonzero {SIZE}"),
    "mask": (lambda: X[X > 0], f"aten.index {MASK}"),
    "mask of bytes": (lambda: X[COUNTS.repeat(4).byte()], f"aten.index {MASK}"),
    "mask in one place": (lambda: X.view(3, 4)[:, torch.ones(4, dtype=torch.bool)], f"aten.index {MASK}"),
    "into a mask": (lambda: X.clone().index_put_((X > 0,), X[:6]), f"aten.index_put_ {MASK}"),
    "masked select": (lambda: X.masked_select(X > 0), f"aten.masked_select {SIZE}"),
    "unique": (lambda: COUNTS.unique(sorted=True), f"aten._unique2 {SIZE}"),
    "unique rows": (lambda: COUNTS[None].unique(dim=0), f"aten.unique_dim {SIZE}"),
    "unique neighbours": (
        lambda: COUNTS.unique_consecutive(dim=0),
        f"aten.unique_consecutive {SIZE}",
    ),
    "counting": (lambda: COUNTS.bincount(minlength=4), f"aten.bincount {SIZE}"),
    "repeating": (lambda: X[:3].repeat_interleave(COUNTS), f"aten.repeat_interleave {SIZE}"),
    "to another device": (lambda: X.to("meta"), f"aten._to_copy {COPY}"),
    "into another device": (lambda: META.copy_(X[:3]), f"aten.copy_ {COPY}"),
}

FREE: dict[str, Callable[[], object]] = {
    "integer index": lambda: X[COUNTS],
    "integer index of 32 bits": lambda: X[COUNTS.int()],
    "integer index of a mask": lambda: (X > 0)[COUNTS],
    "several": lambda: X.view(3, 4)[COUNTS, COUNTS],
    "into an integer index": lambda: X.clone().index_put_((COUNTS,), X[:3], accumulate=True),
    "take": lambda: X.take(COUNTS),
    "gather": lambda: X.gather(0, COUNTS),
    "select": lambda: X.index_select(0, COUNTS),
    "scatter": lambda: torch.zeros(12).scatter_(0, COUNTS, 1.0),
    "masked fill": lambda: X.clone().masked_fill_(X > 0, 0.0),
    "a number where a mask is": lambda: X.clone().__setitem__(X > 0, 0.0),
    "choice": lambda: torch.where(X > 0, X, 0.0),
    "a mask as a number": lambda: X * (X > 0),
    "another type": lambda: X.bfloat16().double(),
    "another layout": lambda: X.view(1, 3, 2, 2).contiguous(memory_format=torch.channels_last),
    "copy": lambda: torch.empty(12).copy_(X),
    "on the other device": lambda: META.clone().copy_(META.double()),
    "repeating by a number": lambda: X.repeat_interleave(2),
    "dropout": lambda: F.dropout(X, 0.5),
    "cross-entropy": lambda: F.cross_entropy(X.view(3, 4), COUNTS),
    "nonzero of a known size": lambda: torch.nonzero_static(X, size=4),
}


@pytest.mark.filterwarnings("ignore:indexing with dtype torch.uint8")
@pytest.mark.parametrize("name", OBSTACLES)
def test_each_kind_is_named_with_its_line(name: str) -> None:
    call, what = OBSTACLES[name]
    place = f"{Path(__file__).name}:{call.__code__.co_firstlineno}"
    assert find_obstacle(call) == f"{what}, at {place}"


@pytest.mark.parametrize("name", FREE)
def test_what_a_graph_can_hold_is_no_obstacle(name: str) -> None:
    assert find_obstacle(FREE[name]) is None


def test_the_first_of_several_is_named_and_all_are_done() -> None:
    done: list[object] = []

    def call() -> None:
        done.append(X.nonzero())
        done.append(X.sum().item())

    found = find_obstacle(call)
    assert found is not None
    assert found.startswith("aten.nonzero")
    assert len(done) == 2


def test_an_obstacle_in_backward_is_found() -> None:
    class Reads(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
            return grad * grad.sum().item()

    x = X.clone().requires_grad_()
    found = find_obstacle(lambda: Reads.apply(x).sum().backward())  # pyright: ignore[reportOptionalMemberAccess]
    assert found is not None
    assert found.startswith(f"aten._local_scalar_dense {READ}, at {Path(__file__).name}:")


def test_an_error_of_the_call_is_the_calls() -> None:
    with pytest.raises(ZeroDivisionError):
        find_obstacle(lambda: 1 / 0)


STATES: dict[str, Callable[[], TrainState]] = {
    **{f"{m} peers": lambda m=m: tiny_state(num_peers=m) for m in (1, 2, 3, 8)},
    **{f"{how} statistics": lambda how=how: tiny_state(num_peers=2, ema_bn=how) for how in ("copy", "ema")},
    "ensemble not detached": lambda: tiny_state(num_peers=2, detach_ensemble=False),
    "no ensemble teacher": lambda: tiny_state(num_peers=2, ensemble_teacher=False),
    "no mean teachers": lambda: tiny_state(num_peers=2, mean_teacher=False),
    "one view": lambda: tiny_state(num_peers=2, view_per_peer=False),
    "joint statistics": lambda: tiny_state(num_peers=2, bn_views="joint"),
    "views in turn": lambda: tiny_state(num_peers=2, trunk_views="loop"),
    "bfloat16": lambda: tiny_state("bfloat16", num_peers=2),
    "vanilla": lambda: build_state(dataclasses.replace(tiny_config(), method="vanilla")),
}


@pytest.mark.parametrize("name", STATES)
def test_a_step_has_none(name: str) -> None:
    """Forward, loss, backward, update and averages."""
    state = STATES[name]()
    batches = make_batches(2, state.objective.num_views)
    assert find_obstacle(lambda: train(state, batches)) is None


def test_being_watched_changes_nothing() -> None:
    watched, alone = tiny_state(num_peers=2), tiny_state(num_peers=2)
    batches = make_batches(2, views=2)
    find_obstacle(lambda: train(watched, batches))
    train(alone, batches)
    assert equal(parameters(watched.network), parameters(alone.network))
