"""The factor that keeps gradients within float16's range, on the device: a step is captured with it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pcl_fast.guard import SavedTensors
from pcl_fast.step.reduction import times

FIRST, PATIENCE = 2.0**16, 2_000  # the factor at first; steps without an overflow before it is doubled


class LossScale(SavedTensors):
    """What a loss is multiplied with before it is differentiated, and its gradients are divided by after.

    Where the gradients are not finite, the step is skipped and the factor halved; after 2,000 steps in a row
    without that it is doubled (Micikevicius et al., ICLR 2018; the numbers are `torch.amp.GradScaler`'s). It
    never falls below 1: gradients that are not finite even so are left for `FiniteGuard` to see.

    Everything lies on the device and nothing waits for it. Ranks that see the same gradients do the same.
    """

    def __init__(self, device: torch.device) -> None:
        self.scale = torch.full((), FIRST, device=device)
        self._clean, self.skipped = torch.zeros(2, dtype=torch.int64, device=device).unbind()

    def applied(self, seeds: Sequence[Tensor | None], roots: Sequence[Tensor]) -> list[Tensor]:
        """Seeds of a backward pass that differentiates the loss times the factor."""
        return times(seeds, roots, self.scale)

    @torch.no_grad()
    def alarming(self, norm: Tensor) -> Tensor:
        """`norm`, of gradients that are still multiplied, where a smaller factor cannot help; else 0."""
        return torch.where(self.scale > 1, 0.0, norm)

    @torch.no_grad()
    def undo(self, gradients: Tensor) -> Tensor:
        """Divide `gradients` by the factor, in place, and set it for the next step.

        Returns 1, float32 [], if they were not finite: then they are made 0, and the step should be skipped.
        """
        lost = ~torch.isfinite(torch.linalg.vector_norm(gradients)) & (self.scale > 1)
        gradients.div_(self.scale).masked_fill_(lost, 0.0)
        self._clean.copy_(torch.where(lost, 0, self._clean + 1))
        grows = self._clean >= PATIENCE
        self.scale.mul_(torch.where(lost, 0.5, torch.where(grows, 2.0, 1.0)))
        self._clean.mul_(~grows)
        self.skipped.add_(lost)
        return lost.float()

    def _tensors(self) -> dict[str, Tensor]:
        return {"scale": self.scale, "clean": self._clean, "skipped": self.skipped}
