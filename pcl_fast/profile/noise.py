"""One batch of noise, for ever: what a step costs when its data cost nothing."""

from collections.abc import Iterator

import torch

from pcl_fast.config import TRAIN_IMAGES, Config
from pcl_fast.contract import ViewBatch
from pcl_fast.device import memory_format
from pcl_fast.objectives import make_objective


def steps_of_noise(config: Config) -> int:
    """Steps of an epoch as long as the data set's, without its last incomplete one."""
    images = config.data.subset or TRAIN_IMAGES[config.data.dataset]
    return max(1, images // config.train.batch_size)


class NoiseLoader:
    """Serves the same normal noise at every step of a resolved configuration; a `DeviceLoader`.

    Of the layout and the precision that the data set's loaders would give; epochs are as long as its own.
    """

    is_even = True

    def __init__(self, config: Config) -> None:
        """Make the batch."""
        device, pixels = torch.device(config.device), config.data.pixels
        num_views, self.batch_size = make_objective(config).num_views, config.train.batch_size
        self.num_samples = config.data.subset or TRAIN_IMAGES[config.data.dataset]
        self.steps_per_epoch = steps_of_noise(config)
        draws = torch.Generator(device).manual_seed(config.seed)
        rows = num_views * self.batch_size
        images = torch.randn((rows, 3, pixels, pixels), generator=draws, device=device)
        narrow = config.amp.dtype == "bfloat16" and (
            config.data.dataset == "imagenet" or device.type == "cuda"
        )
        images = images.to(torch.bfloat16 if narrow else torch.float32)
        images = images.contiguous(memory_format=memory_format(config.channels_last))
        shape = (self.batch_size,)
        labels_B = torch.randint(config.data.classes, shape, generator=draws, device=device)
        ids_B = torch.arange(self.batch_size, device=device)
        self.batch = ViewBatch(images.unflatten(0, (num_views, -1)), labels_B, ids_B)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[ViewBatch]:
        """Yield the batch for each step of the epoch from `first_step` on."""
        return (self.batch for _ in range(first_step, self.steps_per_epoch))

    def begin(self, epoch: int, first_step: int = 0) -> None:
        """Nothing is to be laid out."""

    def take(self) -> ViewBatch:
        """The batch."""
        return self.batch
