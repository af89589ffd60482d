"""Fail before the optimizer's step, not after: the device-side check for losses that are not finite."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pcl_fast.errors import DivergedError
from pcl_fast.kernels.bookkeeping import Latch, watch


class FiniteGuard:
    """Latches the first step at which a watched value was not finite.

    From that step on `watch` returns 1, with which the update is skipped on the device, so that the
    weights stay those of the last finite step until the host looks (`check`); no step waits for it.
    """

    def __init__(self, names: tuple[str, ...], device: torch.device) -> None:
        self.names = names
        bad = torch.zeros(len(names), dtype=torch.bool, device=device)
        self._latch = Latch(bad, torch.zeros((), dtype=torch.int64, device=device))

    @torch.no_grad()
    def watch(self, values: Sequence[Tensor], step: int | Tensor) -> Tensor:
        """Look at a step's `values`, a number for each name; 1, float32 [], from the first bad one on."""
        return watch(values, self._latch, step)

    def check(self) -> None:
        """Raise DivergedError naming the step and the values, if any was bad. Waits for the device."""
        if not self._latch.bad.any():
            return
        names = ", ".join(name for name, bad in zip(self.names, self._latch.bad.tolist(), strict=True) if bad)
        raise DivergedError(
            f"step {int(self._latch.step)}: not finite: {names}; the weights are those before this step. "
            "Try a lower --optim.lr, or --amp.dtype float32"
        )
