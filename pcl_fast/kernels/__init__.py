"""Kernels of our own, each with its reference in plain torch."""

import torch

from pcl_fast import native
from pcl_fast.device import has_triton
from pcl_fast.kernels import norm_act, residual_blocks


def describe(device: torch.device) -> str:
    """Whose kernels train on a device, in one line, with the reason where they are not all ours."""
    if device.type != "cpu":
        return "ours, in Triton" if has_triton() else "torch's (triton is missing)"
    reasons = [native.why_unavailable(norm_act.SOURCE), residual_blocks.why_unavailable()]
    missing = [reason for reason in reasons if reason is not None]
    if len(missing) == len(reasons):
        return f"torch's ({missing[0]})"
    return f"ours{'; ' + missing[0] if missing else ''}"
