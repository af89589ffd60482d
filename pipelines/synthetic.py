"""Noise in place of a data set: one fixed batch, made once, served for ever.

What a training step costs when data costs nothing: the ceiling that real loaders are held against.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pcl_fast.contract import EvalBatch, ViewBatch
from pcl_fast.errors import ConfigError
from pipelines.order import check_first_step, check_rank, share, steps_per_epoch

# Of two ranks; CPU generators take 32 bits of a seed. Odd, and far from what seeds differ by.
SEEDS_APART = 0x9E3779B1


@dataclass(frozen=True, slots=True, kw_only=True)
class SyntheticOptions:
    """The size of the pretended data set and of its batches. `num_views` is not used in evaluation.

    Each of the `world_size` ranks has batches of `batch_size`, and noise of its own.
    """

    num_samples: int
    num_classes: int
    image_size: int
    batch_size: int
    seed: int
    device: torch.device
    num_views: int = 1
    channels_last: bool = False
    rank: int = 0
    world_size: int = 1
    epoch_sizes: tuple[int, ...] = ()
    """Height and width of the views of the first epochs, in the place of `image_size`."""

    def __post_init__(self) -> None:
        check_rank(self.rank, self.world_size)
        for name in ("num_samples", "num_classes", "image_size", "batch_size", "num_views"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"{name} of the synthetic data is {getattr(self, name)}: it must be at least 1"
                )


class SyntheticTrainLoader:
    """Serves one fixed batch of normal noise at every step, without a shorter last one; a `TrainLoader`.

    Epochs with views of another size have another one.
    """

    def __init__(self, options: SyntheticOptions) -> None:
        """Make the batch.

        Raises:
            ConfigError: if the samples do not fill one batch.
        """
        self.num_samples = options.num_samples
        global_batch = options.batch_size * options.world_size
        self.steps_per_epoch = steps_per_epoch(options.num_samples, global_batch, drop_last=True)
        if self.steps_per_epoch == 0:
            raise ConfigError(
                f"{options.num_samples} synthetic samples do not fill one batch of {global_batch}: "
                "use a smaller batch size or more samples"
            )
        self.options = options
        self.batch = self._make(options.image_size)
        self.batch_size = options.batch_size
        self.is_even = set(options.epoch_sizes) <= {options.image_size}

    def begin(self, epoch: int, first_step: int = 0) -> None:
        """Nothing is to be laid out: all batches are one.

        Raises:
            ConfigError: for a step that the epoch does not have.
        """
        check_first_step(first_step, self.steps_per_epoch)

    def take(self) -> ViewBatch:
        """The batch."""
        assert self.is_even, "epochs differ in the size of their views"
        return self.batch

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[ViewBatch]:
        """Yield the same batch for each step of the epoch from `first_step` on.

        Raises:
            ConfigError: for a step that the epoch does not have.
        """
        check_first_step(first_step, self.steps_per_epoch)
        sizes = self.options.epoch_sizes
        size = sizes[epoch] if epoch < len(sizes) else self.options.image_size
        batch = self.batch if size == self.options.image_size else self._make(size)
        return (batch for _ in range(first_step, self.steps_per_epoch))

    def _make(self, size: int) -> ViewBatch:
        options = self.options
        images, labels_B = _noise(dataclasses.replace(options, image_size=size), options.num_views)
        views_VBCHW = images.unflatten(0, (options.num_views, options.batch_size))
        first = options.rank * options.batch_size
        ids_B = torch.arange(first, first + options.batch_size, device=options.device)
        return ViewBatch(views_VBCHW, labels_B, ids_B)


class SyntheticEvalLoader:
    """Serves one fixed batch of normal noise until its rank's samples are used up; an `EvalLoader`.

    `num_samples` are those of all ranks.
    """

    def __init__(self, options: SyntheticOptions) -> None:
        self.num_samples = options.num_samples
        self._mine = range(options.num_samples)[share(options.num_samples, options.rank, options.world_size)]
        self.images_BCHW, self.labels_B = _noise(options, num_views=1)

    def __iter__(self) -> Iterator[EvalBatch]:
        """Yield every batch once, the last one shorter if need be."""
        for left in range(len(self._mine), 0, -len(self.labels_B)):
            yield EvalBatch(self.images_BCHW[:left], self.labels_B[:left])


def _noise(options: SyntheticOptions, num_views: int) -> tuple[Tensor, Tensor]:
    """Images `[num_views * B, 3, H, W]` in the layout asked for, and labels `[B]`."""
    seed = (options.seed + SEEDS_APART * options.rank) % (1 << 32)
    draws = torch.Generator(options.device).manual_seed(seed)
    shape = (num_views * options.batch_size, 3, options.image_size, options.image_size)
    images = torch.randn(shape, generator=draws, device=options.device)
    labels_B = torch.randint(
        options.num_classes, (options.batch_size,), generator=draws, device=options.device
    )
    layout = torch.channels_last if options.channels_last else torch.contiguous_format
    return images.contiguous(memory_format=layout), labels_B
