"""The order of an epoch: a permutation that depends on (seed, epoch) and on nothing else."""

import torch
from torch import Tensor

from pcl_fast.errors import ConfigError
from pcl_fast.philox import Stream, philox_torch


def epoch_order(num_samples: int, seed: int, epoch: int | Tensor, device: torch.device) -> Tensor:
    """A permutation of `num_samples` samples, int64 `[num_samples]`, the same on every device.

    Batch k of an epoch is the slice `[k * batch_size, (k + 1) * batch_size)` of it, so resuming at
    batch k is the slice from there on. `epoch` may be a tensor on `device`; nothing synchronises.
    """
    samples = torch.arange(num_samples, device=device)
    high, low, _, _ = philox_torch((seed, Stream.ORDER), epoch, samples, 0, 0)
    # Sorting by independent keys is a uniform shuffle. 63 bits make a tie a matter of one epoch in
    # billions; the stable sort settles it the same way on every device.
    return torch.argsort((high << 31) | (low >> 1), stable=True)


def steps_per_epoch(num_samples: int, batch_size: int, drop_last: bool) -> int:
    """Batches an epoch: the last, shorter one is left out with `drop_last`."""
    whole, rest = divmod(num_samples, batch_size)
    return whole + (rest > 0 and not drop_last)


def check_first_step(first_step: int, steps: int) -> None:
    """Refuse to begin an epoch at a step that it does not have; `steps` itself is its end.

    Raises:
        ConfigError: for a step outside `[0, steps]`.
    """
    if not 0 <= first_step <= steps:
        raise ConfigError(
            f"cannot begin an epoch at step {first_step}: it has {steps} steps; "
            "resume with the batch size and data set that the run began with"
        )
