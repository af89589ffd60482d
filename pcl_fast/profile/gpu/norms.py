"""BatchNorm with residual and ReLU: our kernels, torch's, and the formula through torch.compile."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from pcl_fast.kernels import norm_act
from pcl_fast.kernels.norm_act import Kernels, NormState
from pcl_fast.models.view_norm import ViewBatchNorm2d
from pcl_fast.profile.gpu.bench import Bench, Row

UNCACHED = 256 << 20


@dataclass(frozen=True, slots=True)
class Case:
    """A layer of a network: [V * B, C, side, side] in bfloat16, with a ReLU and perhaps a residual."""

    name: str
    views: int
    batch: int
    channels: int
    side: int
    residual: bool

    @property
    def bytes(self) -> int:
        """Of one tensor."""
        return 2 * self.views * self.batch * self.channels * self.side**2

    @property
    def moved(self) -> tuple[int, int]:
        """What our kernels read and write, forward, and in both ways together."""
        forward = 3 + self.residual
        return forward * self.bytes, (forward + 7) * self.bytes


CASES = (
    Case("ResNet-32, trunk, stage 1, end of a block", 3, 128, 16, 32, residual=True),
    Case("ResNet-32, trunk, stage 2, in a block", 3, 128, 32, 16, residual=False),
    Case("ResNet-32, branch, end of a block", 1, 128, 64, 8, residual=True),
    Case("ResNet-50, trunk, layer 1, end of a block", 3, 64, 256, 56, residual=True),
    Case("ResNet-50, trunk, layer 1, in a block", 3, 64, 64, 56, residual=False),
    Case("ResNet-50, branch, layer 3, end of a block", 1, 64, 1024, 14, residual=True),
)
TINY = (Case("tiny", 2, 2, 16, 4, residual=True), Case("tiny", 1, 2, 16, 4, residual=False))


def measure_norms(bench: Bench) -> None:
    """Ours in Triton and torch's own, forward and both ways."""
    for case in bench.pick(CASES, TINY):
        for by in ("ours", "torch"):
            _measure(bench, case, by)


def measure_compiled_norms(bench: Bench) -> None:
    """What torch.compile makes of the same; it takes seconds a case."""
    for case in bench.pick(CASES, TINY):
        _measure(bench, case, "torch.compile")


def _measure(bench: Bench, case: Case, by: str) -> None:
    forward, both = case.moved
    shape = [case.views * case.batch, case.channels, case.side, case.side]
    about = {"what": "norm", "case": case.name, "by": by, "views": case.views, "shape": shape}
    about |= {"residual": case.residual, "forward_bytes": forward, "bytes": both}
    bench.attempt(about, partial(_times, bench, case, by))


def _times(bench: Bench, case: Case, by: str) -> Row:
    held = case.bytes * (2 + case.residual)
    sets = 1 if bench.tiny else math.ceil(UNCACHED / held)
    layer = _Layer(bench, case, by)
    inputs = [_Inputs(case, bench.device) for _ in range(sets)]
    forward = bench.time_graph([partial(layer.forward, each) for each in inputs])
    both = bench.time_graph([partial(layer.both_ways, each) for each in inputs])
    return {"sets": sets, "forward_seconds": forward, "seconds": both}


class _Inputs:
    def __init__(self, case: Case, device: torch.device) -> None:
        shape = (case.views * case.batch, case.channels, case.side, case.side)

        def draw() -> Tensor:
            values = torch.randn(shape, device=device).bfloat16()
            return values.contiguous(memory_format=torch.channels_last)

        self.x, self.grad = draw().requires_grad_(), draw()
        self.residual = draw().requires_grad_() if case.residual else None


class _Layer:
    """A layer by one of the ways."""

    def __init__(self, bench: Bench, case: Case, by: str) -> None:
        norm = ViewBatchNorm2d(case.channels, device=bench.device)
        norm.num_views, norm.counts = case.views, False
        self.parameters = norm.weight, norm.bias
        self.run = {"ours": _by_triton, "torch": lambda norm: norm, "torch.compile": bench.compile}[by](norm)

    def forward(self, inputs: _Inputs) -> Tensor:
        return self.run(inputs.x, inputs.residual, True)

    def both_ways(self, inputs: _Inputs) -> None:
        given = [inputs.x, *self.parameters, *([] if inputs.residual is None else [inputs.residual])]
        torch.autograd.grad(self.forward(inputs), given, inputs.grad)


def _by_triton(norm: ViewBatchNorm2d) -> Callable[..., Tensor]:
    from pcl_fast.kernels.norm_act_triton import TRITON

    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.momentum is not None
    buffers = norm.running_mean, norm.running_var
    state = NormState(norm.weight, norm.bias, *buffers, norm.momentum, norm.eps)
    return partial(_norm_act, state, norm.num_views, TRITON)


def _norm_act(
    state: NormState, views: int, kernels: Kernels, x: Tensor, residual: Tensor | None, relu: bool
) -> Tensor:
    return norm_act.norm_act(x, state, residual, relu, views, kernels)
