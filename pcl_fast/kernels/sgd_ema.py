"""SGD with Nesterov's momentum and weight decay, the mean teachers' average and both bfloat16 copies, in one.

Everything lies in flat buffers, one element a weight. In one pass a weight costs 32 bytes of traffic: value,
gradient, momentum and average are read (16), value, momentum and average written (12), and both bfloat16
copies (4). Operation by operation it is about three times that.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from pcl_fast.device import has_triton

# Weights whose buffers (1.3 MiB) stay in a core's second cache; whole vectors of any processor.
CACHED = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class FlatBuffers:
    """Equally long 1-D contiguous tensors [P]: one element a weight.

    `values`, `gradients`, `momentum` and `averages` are float32 (the reference also takes float64).
    `half_values` and `half_averages` are bfloat16 copies of values and averages; forwards read them.
    """

    values: Tensor
    gradients: Tensor
    momentum: Tensor
    averages: Tensor | None
    half_values: Tensor | None
    half_averages: Tensor | None

    def __post_init__(self) -> None:
        for name, buffer in self.named():
            dtype = torch.bfloat16 if name.startswith("half_") else self.values.dtype
            assert buffer.shape == (self.values.numel(),), (name, buffer.shape, self.values.shape)
            assert buffer.dtype == dtype, (name, buffer.dtype)
            assert buffer.is_contiguous(), (name, buffer.stride())
        assert self.averages is not None or self.half_averages is None, "half_averages without averages"

    def named(self) -> Iterator[tuple[str, Tensor]]:
        """The buffers that are there, by name."""
        for field in fields(self):
            buffer = getattr(self, field.name)
            if buffer is not None:
                yield field.name, buffer

    def parts(self, size: int) -> Iterator["FlatBuffers"]:
        """The buffers, `size` weights at a time."""
        for start in range(0, self.values.numel(), size):
            cut = {name: buffer[start : start + size] for name, buffer in self.named()}
            yield replace(self, **cut)


@dataclass(frozen=True, slots=True, kw_only=True)
class SgdRule:
    """What of SGD stays the same over a run; dampening is 0."""

    momentum: float
    weight_decay: float
    nesterov: bool


def sgd_ema(buffers: FlatBuffers, rule: SgdRule, lr: Tensor, phi: Tensor, stop: Tensor) -> None:
    """One step of `torch.optim.SGD`, then averages = phi averages + (1 - phi) values (PCL eq. 4), in place.

    `lr` and `phi` are float64 and `stop` float32, all of shape [] on the buffers' device, where alone they
    are read: nothing waits, and a CUDA graph can capture it. phi = 0 copies, phi = 1 changes no average.
    Where `stop` is above 0 nothing changes, whatever the gradients are. Halves are rounded to the nearest,
    ties to even. Without momentum (0) that buffer is neither read nor written; gradients never are written.
    """
    if takes(buffers.values):
        from pcl_fast.kernels.sgd_ema_triton import sgd_ema_triton

        sgd_ema_triton(buffers, rule, lr, phi, stop)
    else:
        reference(buffers, rule, lr, phi, stop)


def takes(values: Tensor) -> bool:
    """Whether the Triton kernel can be used: float32 on a CUDA device."""
    return values.is_cuda and values.dtype == torch.float32 and has_triton()


@torch.no_grad()
def reference(buffers: FlatBuffers, rule: SgdRule, lr: Tensor, phi: Tensor, stop: Tensor) -> None:
    """The same in plain torch, which is also what a CPU runs: in place, without a temporary.

    No number is read by the host, not even on a CPU. When stopped, SGD skips, phi is 1 and the halves are
    copied again, which changes nothing as long as values and averages are finite and the halves copies.
    """
    frozen = stop > 0
    size = CACHED * torch.get_num_threads() if stop.device.type == "cpu" else max(1, buffers.values.numel())
    for part in buffers.parts(size):
        _advance(part, rule, lr, phi, frozen)


def _advance(buffers: FlatBuffers, rule: SgdRule, lr: Tensor, phi: Tensor, frozen: Tensor) -> None:
    values, averages = buffers.values, buffers.averages
    torch._fused_sgd_(  # pyright: ignore[reportPrivateUsage]  # what torch.optim.SGD(fused=True) runs
        [values],
        [buffers.gradients],
        [buffers.momentum] if rule.momentum else [],
        weight_decay=rule.weight_decay,
        momentum=rule.momentum,
        lr=lr.float() if lr.is_cuda else lr,  # its CUDA kernel reads float32
        dampening=0.0,
        nesterov=rule.nesterov,
        maximize=False,
        is_first_step=False,
        found_inf=frozen.float(),
    )
    if averages is not None:
        phi = torch.where(frozen, 1.0, phi.to(values.dtype))
        averages.mul_(phi).addcmul_(values, 1 - phi)
    if buffers.half_values is not None:
        buffers.half_values.copy_(values)
    if averages is not None and buffers.half_averages is not None:
        buffers.half_averages.copy_(averages)
