"""How far a head's confidence is from how often it is right: the expected calibration error."""

from collections.abc import Sequence

import torch
from torch import Tensor

BINS = 15  # Guo et al., 2017


def calibration_gaps(confidence_HB: Tensor, hits_HB: Tensor) -> Tensor:
    """Right answers minus confidence, summed within each of `BINS` equal bins of confidence.

    Returns float64 [H, BINS], which may be added up over batches and ranks. A bin has its upper edge.
    """
    confidence_HB = confidence_HB.double()
    bins_HB = (confidence_HB * BINS).ceil().clamp(1, BINS)
    within_HBN = bins_HB[..., None] == torch.arange(1, BINS + 1, device=bins_HB.device)
    return ((hits_HB.double() - confidence_HB)[..., None] * within_HBN).sum(-2)


def calibration_error(gaps: Sequence[float], images: int) -> float:
    """ECE in percent: the mean over the images of what confidence and accuracy differ by in their bin."""
    return 100 * sum(abs(gap) for gap in gaps) / images
