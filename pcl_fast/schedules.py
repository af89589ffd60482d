"""What changes over a run, as pure functions of the epoch or the step."""

import math
from collections.abc import Sequence

import numpy as np

from pcl_fast.philox import Stream, philox_numpy

SIZE_STEP = 32


def learning_rate(start: float, epoch: int, epochs: int, milestones: Sequence[float], gamma: float) -> float:
    """Step decay: `start` times `gamma` for each milestone (a share of `epochs`) that `epoch` has reached.

    The recipe of the lineage: 0.1, times 0.1 at epochs 150 and 225 of 300; `epoch` is 0-based.
    """
    passed = sum(epoch >= milestone_epoch(share, epochs) for share in milestones)
    return start * gamma**passed


def warmup_factor(step: int, warmup_steps: float) -> float:
    """min(1, s / S), what the learning rate is multiplied by at step s = 1, 2, ...; S = 0 for no warm-up.

    S is `warmup_epochs` times the steps of an epoch, and need not be whole.
    """
    assert step >= 1, "steps are counted from 1"
    warmup_steps = round(warmup_steps, 9)  # 0.07 of 100 steps are 7, not 7.000000000000001
    return 1.0 if step >= warmup_steps else step / warmup_steps


def milestone_epoch(share: float, epochs: int) -> int:
    """The first epoch (0-based) at or after `share` of the run."""
    return math.ceil(round(share * epochs, 9))


def view_size(epoch: int, epochs: int, start: int, until: float, pixels: int) -> int:
    """Progressive resizing: height and width of the views of an epoch (0-based) of `epochs`.

    It rises linearly from `start` at epoch 0 to `pixels` at the share `until` of the run, in multiples of 32
    (by which networks divide it), never above `pixels`.
    """
    if epoch >= milestone_epoch(until, epochs):
        return pixels
    exact = start + (pixels - start) * epoch / (until * epochs)
    return min(SIZE_STEP * math.floor(exact / SIZE_STEP + 0.5), pixels)


def rampup_weight(epoch: int, peak: float, rampup_epochs: float) -> float:
    """w(e), the weight of both distillation losses in 0-based epoch e (PCL eqs. 3, 5).

    `peak * exp(-5 (1 - e/alpha)^2)` for e <= alpha, `peak` after; alpha = `rampup_epochs`, 0 for none.
    """
    if epoch > rampup_epochs or rampup_epochs == 0:
        return peak
    return peak * math.exp(-5.0 * (1.0 - epoch / rampup_epochs) ** 2)


def ema_coefficient(update: int, decay: float) -> float:
    """phi(g) = min(1 - 1/g, decay) for the g-th update, g = 1, 2, ...: the first copies the student."""
    assert update >= 1, "EMA updates are counted from 1"
    return min(1.0 - 1.0 / update, decay)


def mixup_shares(alpha: float, seed: int, steps: int) -> list[float]:
    """Mixup's lambda of steps 1, 2, ...: from Beta(alpha, alpha), each a function of (seed, step) alone.

    From two uniform numbers each, without rejection: with t = sqrt(2 alpha (u^(-1/alpha) - 1)) cos(2 pi v),
    which is Student's t of 2 alpha degrees of freedom (Bailey 1994), 1/2 + t / (2 sqrt(2 alpha + t^2)).
    """
    counters = np.arange(1, steps + 1, dtype=np.uint64)
    words = philox_numpy((seed, Stream.MIXUP), counters, 0, 0, 0)
    u, v = ((word.astype(np.float64) + 0.5) * 2.0**-32 for word in words[:2])  # in (0, 1)
    cosine = np.cos(2 * np.pi * v)
    with np.errstate(over="ignore"):  # a small alpha: t is infinite, lambda 0 or 1
        spread = np.expm1(-np.log(u) / alpha)
    return (0.5 + 0.5 * cosine / np.sqrt(1 / spread + cosine**2)).tolist()
