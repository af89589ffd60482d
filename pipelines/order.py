"""The order of an epoch: a permutation that depends on (seed, epoch) and on nothing else.

However many ranks train, step k of an epoch is the same global batch: a slice of that order, of which
each rank takes its part. So an epoch begun by two ranks may be ended by three.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pcl_fast.errors import ConfigError, DataError
from pcl_fast.philox import Key, Stream, philox_torch
from pipelines.options import ImageTrainOptions

# The third word of the counter, which views have elsewhere, keeps the two apart.
_SAMPLES, _PAGES = 0, 1


def epoch_order(num_samples: int, seed: int, epoch: int | Tensor, device: torch.device) -> Tensor:
    """A permutation of `num_samples` samples, int64 `[num_samples]`, the same on every device.

    Batch k of an epoch is the slice `[k * batch_size, (k + 1) * batch_size)` of it, so resuming at
    batch k is the slice from there on. `epoch` may be a tensor on `device`; nothing synchronises.
    """
    return _shuffle(num_samples, (seed, Stream.ORDER), epoch, _SAMPLES, device)


def page_order(page_of_N: NDArray[np.integer], window_pages: int, seed: int, epoch: int) -> Tensor:
    """A shuffle that reads a file of pages window by window, for files larger than memory: int64 `[N]`.

    Pages are shuffled and dealt out in windows of `window_pages`; the samples of a window are shuffled
    together. So samples that follow each other come from at most two windows: memory for
    `2 * window_pages` pages is enough to read each page once an epoch. With a window of all pages this
    is `epoch_order`.
    """
    cpu = torch.device("cpu")
    pages, page_N = np.unique(page_of_N, return_inverse=True)
    order_P = _shuffle(len(pages), (seed, Stream.ORDER), epoch, _PAGES, cpu)
    window_P = torch.empty_like(order_P)
    window_P[order_P] = torch.arange(len(pages)) // window_pages
    order_N = epoch_order(len(page_N), seed, epoch, cpu)
    window_N = window_P[torch.from_numpy(page_N)]
    return order_N[torch.argsort(window_N[order_N], stable=True)]


def held_out_ids(available: int, hold_out: int, seed: int) -> Tensor:
    """The samples that are never trained on: `hold_out` of all, drawn by the seed, int64, in rising order.

    Raises:
        ConfigError: if none would be left.
    """
    if hold_out >= available:
        raise ConfigError(f"--data.hold-out {hold_out}: of {available} training images; hold out fewer")
    order_N = _shuffle(available, (seed, Stream.HELD_OUT), 0, _SAMPLES, torch.device("cpu"))
    return order_N[:hold_out].sort().values


def kept_ids(available: int, hold_out: int, seed: int) -> Tensor | None:
    """All other samples, likewise; None for all there are. Raises what `held_out_ids` raises."""
    if not hold_out:
        return None
    is_kept_N = torch.ones(available, dtype=torch.bool)
    is_kept_N[held_out_ids(available, hold_out, seed)] = False
    return is_kept_N.nonzero()[:, 0]


def steps_per_epoch(num_samples: int, batch_size: int, drop_last: bool) -> int:
    """Batches an epoch: the last, shorter one is left out with `drop_last`."""
    whole, rest = divmod(num_samples, batch_size)
    return whole + (rest > 0 and not drop_last)


def share(count: int, rank: int, world_size: int) -> slice:
    """The part of `count` things in a row that is one rank's; parts differ by one thing at most.

    The parts of ranks 0 to `world_size - 1` are disjoint and together everything.
    """
    return slice(count * rank // world_size, count * (rank + 1) // world_size)


def check_rank(rank: int, world_size: int) -> None:
    """Refuse a rank that its world does not have.

    Raises:
        ConfigError: naming both.
    """
    if not 0 <= rank < world_size:
        raise ConfigError(
            f"rank {rank} of {world_size} cannot be served: ranks are 0 to the number of them - 1"
        )


def check_last_batch(num_samples: int, global_batch: int, world_size: int, drop_last: bool) -> None:
    """Refuse a last batch too short to give every rank a sample.

    Raises:
        ConfigError: with the way to leave it out.
    """
    rest = num_samples % global_batch
    if not drop_last and 0 < rest < world_size:
        raise ConfigError(
            f"--no-data.drop-last: the last batch has {rest} images for {world_size} ranks; "
            "leave it out (--data.drop-last)"
        )


def rank_order(order_N: Tensor, global_batch: int, rank: int, world_size: int) -> Tensor:
    """One rank's share of each global batch of an order, one after the other.

    But for a shorter last one, all its batches are of `global_batch / world_size`.
    """
    whole = len(order_N) // global_batch * global_batch
    rest_N = order_N[whole:]
    batches_SWB = order_N[:whole].view(-1, world_size, global_batch // world_size)
    return torch.cat([batches_SWB[:, rank].flatten(), rest_N[share(len(rest_N), rank, world_size)]])


@dataclass(frozen=True, slots=True)
class EpochPlan:
    """Which samples a rank trains on at each step of each epoch.

    `page_of_N` says on which page of its file each sample lies; it is needed for the order "pages".
    `kept_N` are the samples themselves, where some are held out.
    """

    num_samples: int
    steps_per_epoch: int
    options: ImageTrainOptions
    page_of_N: NDArray[np.integer] | None
    kept_N: Tensor | None = None

    @classmethod
    def of(
        cls, available: int, options: ImageTrainOptions, page_of_N: NDArray[np.integer] | None = None
    ) -> "EpochPlan":
        """The plan for a data set of `available` samples, or for `options.subset` of them.

        Raises:
            ConfigError: for a subset, images to hold out or an order that the data set does not have, or
                for a last batch too short to give every rank a sample.
            DataError: if the samples do not fill one batch.
        """
        num_samples = options.subset or available
        if num_samples > available:
            raise ConfigError(f"--data.subset {num_samples}: the training set has {available} images")
        if options.order == "pages" and page_of_N is None:
            raise ConfigError(
                "--data.order pages: a folder has no pages; give a .beton file or --data.order shuffled"
            )
        pages = page_of_N[:num_samples] if page_of_N is not None else None
        kept_N = kept_ids(num_samples, options.hold_out, options.seed)
        if kept_N is not None:
            num_samples, pages = len(kept_N), pages[kept_N.numpy()] if pages is not None else None
        global_batch = options.batch_size * options.world_size
        steps = steps_per_epoch(num_samples, global_batch, options.drop_last)
        check_last_batch(num_samples, global_batch, options.world_size, options.drop_last)
        if steps == 0:
            raise DataError(
                f"{num_samples} training images do not fill one batch of {global_batch}: "
                "use a smaller --train.batch-size, more images, or keep the last, shorter batch"
            )
        return cls(num_samples, steps, options, pages, kept_N)

    def batches(self, epoch: int, first_step: int = 0) -> Sequence[Tensor]:
        """The ids of this rank's samples, int64 `[B]`, for each step of an epoch from `first_step` on.

        Raises:
            ConfigError: for a step that the epoch does not have.
        """
        check_first_step(first_step, self.steps_per_epoch)
        options = self.options
        global_batch = options.batch_size * options.world_size
        order_N = self._order(epoch)[: self.steps_per_epoch * global_batch]
        if first_step == self.steps_per_epoch:
            return ()
        return tuple(
            ids[share(len(ids), options.rank, options.world_size)]
            for ids in order_N[first_step * global_batch :].split(global_batch)
        )

    def _order(self, epoch: int) -> Tensor:
        options = self.options
        if options.order == "pages":
            assert self.page_of_N is not None
            order_N = page_order(self.page_of_N, options.window_pages, options.seed, epoch)
        else:
            order_N = epoch_order(self.num_samples, options.seed, epoch, torch.device("cpu"))
        return order_N if self.kept_N is None else self.kept_N[order_N]


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


def _shuffle(count: int, key: Key, epoch: int | Tensor, things: int, device: torch.device) -> Tensor:
    """A uniform permutation of `count` things; `things` tells draws for samples from draws for pages."""
    numbers = torch.arange(count, device=device)
    high, low, _, _ = philox_torch(key, epoch, numbers, things, 0)
    # Sorting by independent keys is a uniform shuffle. 63 bits make a tie a matter of one epoch in
    # billions; the stable sort settles it the same way on every device.
    return torch.argsort((high << 31) | (low >> 1), stable=True)
