"""The convex combination of several networks' logits with the lowest cross-entropy, image by image."""

import torch
import torch.nn.functional as F
from torch import Tensor

from pcl_fast.objectives.base import label_logits

ROUNDS = 22  # of Newton's method
LAST = 6  # of them, with the last barrier
SIZES = 4  # of a step that are tried at once
CLOSE = 1e-4  # what an inactive weight may cost in the end


@torch.no_grad()
def best_weights(logits_VBC: Tensor, labels_B: Tensor) -> Tensor:
    """The weights a >= 0, whose sum is 1, that minimise CE(sum_v a_v z_v, y): float64 [B, V].

    Newton's method with a barrier, mu sum log a, that falls from the size of the logits to `CLOSE`: the
    cross-entropy ends within V `CLOSE` of the least. Every image takes as many rounds, and the host reads
    nothing; where logits differ by a thousand and more, they may be too few. Float64, as such logits leave
    curvatures that float32 has no digits for; but not where sizes of a step are compared.
    """
    z_BVC = logits_VBC.double().transpose(0, 1)
    of_labels_BV = label_logits(logits_VBC.double(), labels_B).t()
    z_BVC = (z_BVC - of_labels_BV[..., None]).contiguous()  # the loss is now the logsumexp of what a combines
    reach_B = z_BVC.amax((1, 2)) - z_BVC.amin((1, 2))
    first_B = (0.3 * reach_B).clamp(min=CLOSE)
    weights_BV = torch.full_like(z_BVC[..., 0], 1 / z_BVC.shape[1])
    for number in range(ROUNDS):
        left = max(0.0, 1 - number / (ROUNDS - LAST))
        weights_BV = _advance(weights_BV, z_BVC, CLOSE * (first_B / CLOSE) ** left)
    return weights_BV


def _advance(weights_BV: Tensor, z_BVC: Tensor, mu_B: Tensor) -> Tensor:
    """A step of Newton's method, of the size that suits each image best; no weight gets to 0.

    A barrier above 1 is one of 1 for logits that are softened by it: their kinks are smooth as long as
    the barrier keeps away from them.
    """
    soft_B1, mu_B = mu_B.clamp(min=1)[:, None], mu_B.clamp(max=1)
    logits_BC = _combined(weights_BV / soft_B1, z_BVC)
    p_BC = F.softmax(logits_BC, dim=-1)
    likely_BVC = z_BVC * p_BC[:, None]
    mean_BV = likely_BVC.sum(-1)
    spread_BVV = likely_BVC @ z_BVC.transpose(1, 2) - mean_BV[:, None] * mean_BV[..., None]
    pull_BV, scaled_BV = weights_BV * mean_BV / soft_B1, weights_BV / soft_B1
    curvature_BVV = scaled_BV[:, None] * spread_BVV * scaled_BV[..., None]
    ratio_BV = _newton_step(weights_BV, pull_BV, curvature_BVV, mu_B)
    along_BC = _combined(scaled_BV * ratio_BV, z_BVC).float()
    bend_B = (ratio_BV[:, None] @ curvature_BVV @ ratio_BV[..., None])[:, 0, 0]
    gain_B = (ratio_BV * (mu_B[:, None] - pull_BV)).sum(1)
    sizes_BS = _sizes(ratio_BV, gain_B, bend_B, along_BC)
    tried_BSC = torch.addcmul(logits_BC.float()[:, None], sizes_BS.float()[..., None], along_BC[:, None])
    barriers_BS = mu_B[:, None] * (sizes_BS[..., None] * ratio_BV[:, None]).log1p().sum(-1)
    best_B1 = (torch.logsumexp(tried_BSC, -1) - barriers_BS).argmin(1)[:, None]
    weights_BV = weights_BV * (1 + sizes_BS.gather(1, best_B1) * ratio_BV)
    return weights_BV / weights_BV.sum(1, keepdim=True)


def _combined(weights_BV: Tensor, z_BVC: Tensor) -> Tensor:
    """sum_v a_v z_v: [B, C]."""
    return (weights_BV[:, None] @ z_BVC)[:, 0]


def _newton_step(weights_BV: Tensor, pull_BV: Tensor, curvature_BVV: Tensor, mu_B: Tensor) -> Tensor:
    """u, of a step a * u whose entries add up to 0, to the least of logsumexp(sum_v a_v z_v) - mu sum log a.

    (A H A + mu) u = mu - A g - nu a, g and H the mean and covariance of z under p; `pull_BV` is A g and
    `curvature_BVV` A H A.
    """
    matrix_BVV = curvature_BVV + torch.diag_embed(mu_B[:, None].expand_as(weights_BV))
    right_BV2 = torch.stack([mu_B[:, None] - pull_BV, weights_BV], dim=2)
    free_BV, of_sum_BV = _solve(matrix_BVV, right_BV2).unbind(2)
    nu_B1 = (weights_BV * free_BV).sum(1, True) / (weights_BV * of_sum_BV).sum(1, True)
    return free_BV - nu_B1 * of_sum_BV


def _sizes(ratio_BV: Tensor, gain_B: Tensor, bend_B: Tensor, along_BC: Tensor) -> Tensor:
    """How much of a step to try: from all of it, or what no weight reaches 0 by, to a cautious size.

    That is where the loss would be least if its curvature along the step, now `bend_B`, grew as fast as that
    of a logsumexp can, by e^(r t) with r the range of the step over the classes. `gain_B` is what the step
    promises at first. Returns [B, S].
    """
    range_B = (along_BC.amax(1) - along_BC.amin(1)).double().clamp(min=1e-12)
    all_B = 0.9 / (-ratio_BV).amax(1).clamp(min=0.9)
    cautious_B = torch.log1p((gain_B * range_B / bend_B.clamp(min=1e-300)).clamp(min=0)) / range_B
    cautious_B = torch.minimum(cautious_B.clamp(min=1e-9), all_B)
    shares_S = torch.linspace(0, 1, SIZES, dtype=all_B.dtype, device=all_B.device)
    return all_B[:, None] ** (1 - shares_S) * cautious_B[:, None] ** shares_S


def _solve(matrix_BVV: Tensor, right_BVK: Tensor) -> Tensor:
    """Gauss and Jordan's elimination, for positive definite matrices: torch's solvers may ask the host."""
    count = matrix_BVV.shape[1]
    rows_BVN = torch.cat([matrix_BVV, right_BVK], dim=2)
    unit_VV = torch.eye(count, dtype=rows_BVN.dtype, device=rows_BVN.device)
    for k in range(count):
        pivot_B1N = rows_BVN[:, k : k + 1] / rows_BVN[:, k : k + 1, k : k + 1]
        rows_BVN = rows_BVN - (rows_BVN[:, :, k : k + 1] - unit_VV[:, k, None]) * pivot_B1N
    return rows_BVN[..., count:]
