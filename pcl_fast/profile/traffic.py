"""Which kernels an operation takes, and what they move: the rules of the floor, in three tiers.

- `ideal`: activations cross memory for products only. BatchNorm, ReLU and sums are part of the products
  before and behind them. Nobody has this for training.
- `fused`: what a compiler makes around convolutions that it cannot open. BatchNorm takes one pass for
  statistics and one that normalises, adds the residual and cuts off below zero; backward two, likewise.
- `eager`: a kernel for each operation.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from pcl_fast.models.operations import Operation

Tier = Literal["ideal", "fused", "eager"]
TIERS: tuple[Tier, ...] = get_args(Tier)
FLOAT32 = 4  # bytes of a weight, its gradient, its momentum and its average


@dataclass(frozen=True, slots=True)
class Pass:
    """What a kernel does for one image: FLOPs, elements read and written; and for all: bytes of weights.

    `launches` is 0 where a neighbour's kernel does it on the way.
    """

    flops: int
    elements: int
    weight_bytes: int = 0
    launches: int = 1


def forward(operation: Operation, tier: Tier, width: int, statistics: bool = True) -> Iterator[Pass]:
    """An operation's kernels, forward, with activations and copies of weights of `width` bytes.

    Without `statistics`, BatchNorm uses its running ones.
    """
    read, written = operation.read, operation.written
    whole = Pass(operation.flops, read + written, width * operation.parameters)
    match operation.kind:
        case "product" | "pass":
            yield whole
        case "norm" if tier == "fused":
            if statistics:
                yield Pass(0, read)
            yield Pass(0, read + written)
        case "norm" if tier == "eager":
            yield Pass(0, read * (1 + statistics) + written)
        case "addition" if tier == "ideal":  # the products behind read both and write the sum
            yield Pass(0, 2 * written, launches=0)
        case "addition" if tier == "fused" and operation.rides:
            yield Pass(0, read - written, launches=0)
        case "activation" | "addition" if _alone(operation, tier):
            yield whole
        case "concatenation" if tier == "eager":  # elsewhere, each part is made where it belongs
            yield whole
        case _:
            pass


def backward(operation: Operation, tier: Tier, width: int) -> Iterator[Pass]:
    """An operation's kernels, backward: for the gradients of its weights and, if wanted, of its input."""
    read, written, wanted = operation.read, operation.written, operation.needs_gradient
    weights, gradients = width * operation.parameters, FLOAT32 * operation.parameters
    match operation.kind:
        case "product" if tier == "ideal":  # both gradients read together; the norm before is done again
            moved = 2 * written + (1 + wanted) * read
            yield Pass(operation.backward_flops, moved, weights + gradients)
        case "product":
            yield Pass(operation.flops, read + written, gradients)
            if wanted:
                yield Pass(operation.flops, read + written, weights)
        case "norm" if tier == "fused":
            yield Pass(0, 2 * read)
            if wanted:
                yield Pass(0, 2 * read + written)
        case "norm" if tier == "eager":
            yield Pass(0, 4 * read + written)
        case "activation" if wanted and _alone(operation, tier):
            yield Pass(0, 2 * read + written)
        case "pass" if wanted:
            yield Pass(0, read + written)
        case "fork":
            yield _sum_of_gradients(operation, tier)
        case _:
            pass


def _sum_of_gradients(fork: Operation, tier: Tier) -> Pass:
    if tier == "eager":
        return Pass(0, 3 * fork.read, launches=fork.read // fork.written)
    # the sum is read in the place of the gradient; where kernels are closed it is written apart, too
    return Pass(0, fork.read + fork.written * _alone(fork, tier), launches=0)


def _alone(operation: Operation, tier: Tier) -> bool:
    """Whether an element-wise operation has a kernel of its own."""
    return tier == "eager" or (tier == "fused" and not operation.rides)
