"""Before the optimizer's step, on the device: is everything finite, and is it a spike?"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pcl_fast.errors import DivergedError
from pcl_fast.kernels.bookkeeping import Latch, watch

SPIKE_WINDOW, SPIKE_LEAST = 101, 20  # norms whose median is taken, and how many there must be


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


class SavedTensors(ABC):
    """What remembers, in tensors on the device, what its later answers depend on; a run saves them."""

    @abstractmethod
    def _tensors(self) -> dict[str, Tensor]:
        """All of them, by name."""

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of them, by name."""
        return {name: tensor.clone() for name, tensor in self._tensors().items()}

    def load_state_dict(self, saved: Mapping[str, Tensor]) -> None:
        """Go on from `state_dict`, in the same memory."""
        for name, tensor in self._tensors().items():
            tensor.copy_(saved[name])


class SpikeGuard(SavedTensors):
    """Says which steps to skip because their gradient is far larger than usual.

    A spike is a norm above `factor` times the median of the last 101 finite norms, once there are 20. Its
    step is skipped, but no more than `at_most` steps in a row: the spikes that follow are let through until
    a step is none, as so many are no accident but a new level. Norms of skipped steps do not enter the
    median; those let through do, so that a new level becomes the usual one within 51 steps. A norm that is
    not finite changes nothing, and is not skipped: that is `FiniteGuard`'s business.

    Everything lies on the device and nothing waits for it. Ranks that watch the same norm say the same.
    """

    def __init__(self, factor: float, at_most: int, device: torch.device) -> None:
        assert factor > 1, "a factor of 1 or less would skip ordinary steps"
        self.factor, self.at_most = factor, at_most
        self._places = torch.arange(SPIKE_WINDOW, device=device)
        # Norms by the number of their entry; infinity, which sorts last, where there is none yet.
        self._norms = torch.full((SPIKE_WINDOW,), torch.inf, dtype=torch.float64, device=device)
        self._entered, self._in_a_row, self.skipped = torch.zeros(
            3, dtype=torch.int64, device=device
        ).unbind()

    @torch.no_grad()
    def watch(self, norm: Tensor) -> Tensor:
        """Look at a step's gradient norm, a scalar; 1, float32 [], if the step should be skipped, or 0.

        `skipped`, int64 [], counts those of the run.
        """
        norm = norm.to(self._norms.dtype)
        finite = torch.isfinite(norm)
        known = self._entered >= SPIKE_LEAST
        spike = finite & known & (norm > self.factor * self._median())
        skip = spike & (self._in_a_row < self.at_most)
        enters = finite & ~skip
        here = (self._places == self._entered % SPIKE_WINDOW) & enters
        self._norms.copy_(torch.where(here, norm, self._norms))
        self._entered.add_(enters)
        row = torch.where(finite, 0, self._in_a_row)
        self._in_a_row.copy_(torch.where(spike, self._in_a_row + 1, row))
        self.skipped.add_(skip)
        return skip.float()

    def _median(self) -> Tensor:
        """Of the norms that there are, of which there must be one."""
        ordered = self._norms.sort().values
        count = self._entered.clamp(1, SPIKE_WINDOW)
        return (ordered.take((count - 1) // 2) + ordered.take(count // 2)) / 2

    def _tensors(self) -> dict[str, Tensor]:
        return {
            "norms": self._norms,
            "entered": self._entered,
            "in_a_row": self._in_a_row,
            "skipped": self.skipped,
        }
