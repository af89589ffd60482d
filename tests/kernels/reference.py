"""Random inputs for the kernels, and the way to compare them with plain torch in float64."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pcl_fast.kernels.norm_act import NormState

LAST = torch.channels_last


def image(*shape: int, dtype: torch.dtype = torch.bfloat16, shift: float = 0.0) -> Tensor:
    """Channels-last values that bfloat16 holds exactly, and a gradient is wanted for."""
    values = torch.randn(shape).add_(shift).bfloat16().to(dtype)
    return values.contiguous(memory_format=LAST).requires_grad_()


def norm_state(channels: int) -> NormState:
    weight, bias = torch.rand(channels).add_(0.5), torch.randn(channels)
    running = torch.randn(channels), torch.rand(channels).add_(0.5)
    return NormState(weight.requires_grad_(), bias.requires_grad_(), *running, momentum=0.3, eps=1e-3)


def in_float64(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().double().requires_grad_(tensor.requires_grad)


def copy_of(state: NormState, double: bool = False) -> NormState:
    """Its own running statistics; in float64, its own parameters too."""
    running = (state.running_mean.clone(), state.running_var.clone())
    if not double:
        return NormState(state.weight, state.bias, *running, state.momentum, state.eps)
    weight, bias = in_float64(state.weight), in_float64(state.bias)
    assert weight is not None
    assert bias is not None
    mean, var = (tensor.double() for tensor in running)
    return NormState(weight, bias, mean, var, state.momentum, state.eps)


def outcome(run: Callable[[], Tensor], inputs: Sequence[Tensor | None], grad: Tensor) -> list[Tensor]:
    """The output, and the gradients of those inputs that want one."""
    out = run()
    wanted = [tensor for tensor in inputs if tensor is not None and tensor.requires_grad]
    return [out, *torch.autograd.grad(out, wanted, grad.to(out.dtype))]


def distance(found: Tensor, expected: Tensor) -> float:
    """The norm of the difference as a share of the norm of what is expected."""
    return ((found.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()
