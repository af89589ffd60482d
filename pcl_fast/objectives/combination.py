"""The convex combination of several networks' logits with the lowest cross-entropy, image by image."""

import torch
import torch.nn.functional as F
from torch import Tensor

from pcl_fast.objectives.base import label_logits

ROUNDS = 24  # of Newton's method
SIZES = 8  # of a step that are tried at once: all of it, a half, a quarter...
CLOSE = 1e-4  # what an inactive weight may cost in the end


@torch.no_grad()
def best_weights(logits_VBC: Tensor, labels_B: Tensor) -> Tensor:
    """The weights a >= 0, whose sum is 1, that minimise CE(sum_v a_v z_v, y): float64 [B, V].

    Newton's method with a barrier, mu sum log a, that falls from the size of the logits to `CLOSE`: the
    cross-entropy ends within V `CLOSE` of the least. Every image takes as many rounds, and the host reads
    nothing. Float64, as logits in the hundreds leave curvatures that float32 has no digits for.
    """
    z_BVC = logits_VBC.double().transpose(0, 1)
    of_labels_BV = label_logits(logits_VBC.double(), labels_B).t()
    z_BVC = z_BVC - of_labels_BV[..., None]  # the loss is now the logsumexp of what a combines
    reach_B = z_BVC.amax((1, 2)) - z_BVC.amin((1, 2))
    first_B = (0.3 * reach_B).clamp(min=CLOSE)
    weights_BV = torch.full_like(z_BVC[..., 0], 1 / z_BVC.shape[1])
    for number in range(ROUNDS):
        left = max(0.0, 1 - number / (ROUNDS - 3))  # the last rounds have the last barrier
        weights_BV = _advance(weights_BV, z_BVC, CLOSE * (first_B / CLOSE) ** left)
    return weights_BV


def _advance(weights_BV: Tensor, z_BVC: Tensor, mu_B: Tensor) -> Tensor:
    """A step of Newton's method, of the size that suits each image best; no weight gets to 0."""
    step_BV = _newton_step(weights_BV, z_BVC, mu_B)
    to_zero_B = 1 / (-step_BV / weights_BV).amax(1).clamp(min=0.9)
    sizes_S = 0.5 ** torch.arange(SIZES, dtype=z_BVC.dtype, device=z_BVC.device)
    sizes_BS = 0.9 * to_zero_B[:, None] * sizes_S
    tried_BSV = weights_BV[:, None] + sizes_BS[..., None] * step_BV[:, None]
    costs_BS = torch.logsumexp(tried_BSV @ z_BVC, -1) - mu_B[:, None] * tried_BSV.log().sum(-1)
    best_B11 = costs_BS.argmin(1)[:, None, None]
    weights_BV = tried_BSV.gather(1, best_B11.expand(-1, 1, tried_BSV.shape[2]))[:, 0]
    return weights_BV / weights_BV.sum(1, keepdim=True)


def _newton_step(weights_BV: Tensor, z_BVC: Tensor, mu_B: Tensor) -> Tensor:
    """Towards the least of logsumexp(sum_v a_v z_v) - mu sum log a; the entries add up to 0.

    For a step a * u: (A H A + mu) u = mu - A g - nu a, g and H the mean and covariance of z under p.
    """
    p_BC = F.softmax((weights_BV[:, None] @ z_BVC)[:, 0], dim=-1)
    mean_BV = (z_BVC * p_BC[:, None]).sum(-1)
    spread_BVC = weights_BV[..., None] * (z_BVC - mean_BV[..., None])
    barrier_BVV = torch.diag_embed(mu_B[:, None].expand_as(weights_BV))
    matrix_BVV = (spread_BVC * p_BC[:, None]) @ spread_BVC.transpose(1, 2) + barrier_BVV
    pull_BV = mu_B[:, None] - weights_BV * mean_BV
    free_BV, of_sum_BV = _solve(matrix_BVV, torch.stack([pull_BV, weights_BV], dim=2)).unbind(2)
    nu_B1 = (weights_BV * free_BV).sum(1, True) / (weights_BV * of_sum_BV).sum(1, True)
    return weights_BV * (free_BV - nu_B1 * of_sum_BV)


def _solve(matrix_BVV: Tensor, right_BVK: Tensor) -> Tensor:
    """Gauss and Jordan's elimination, for positive definite matrices: torch's solvers may ask the host."""
    count = matrix_BVV.shape[1]
    rows_BVN = torch.cat([matrix_BVV, right_BVK], dim=2)
    unit_VV = torch.eye(count, dtype=rows_BVN.dtype, device=rows_BVN.device)
    for k in range(count):
        pivot_B1N = rows_BVN[:, k : k + 1] / rows_BVN[:, k : k + 1, k : k + 1]
        rows_BVN = rows_BVN - (rows_BVN[:, :, k : k + 1] - unit_VV[:, k, None]) * pivot_B1N
    return rows_BVN[..., count:]
