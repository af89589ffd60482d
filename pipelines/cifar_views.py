"""The CIFAR views: zero-pad 4, a random crop of the original size, a random flip, normalise.

Zeros are padded to the raw pixels, as by torchvision's `RandomCrop(padding=4)`, so that a padded
pixel becomes (0 - mean) / std. What is drawn depends on (seed, epoch, sample, view) alone.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pcl_fast.philox import Stream, below_torch, philox_torch
from pipelines.normalisation import Normalisation

PADDING = 4


@dataclass(frozen=True, slots=True)
class Crops:
    """What was drawn for each view: the crop's corner in the padded image, and whether to flip it.

    `top_VB` and `left_VB` are int64 in [0, 8], `flip_VB` is bool.
    """

    top_VB: Tensor
    left_VB: Tensor
    flip_VB: Tensor


def draw_crops(sample_ids_B: Tensor, num_views: int, seed: int, epoch: int | Tensor) -> Crops:
    """Draw every view of the samples, all offsets equally likely, flips with probability 1/2.

    `epoch` may be a tensor on the samples' device; nothing synchronises.
    """
    views_V1 = torch.arange(num_views, device=sample_ids_B.device).unsqueeze(1)
    words = philox_torch((seed, Stream.AUGMENT), epoch, sample_ids_B, views_V1, 0)
    offsets = 2 * PADDING + 1
    return Crops(below_torch(words[0], offsets), below_torch(words[1], offsets), words[2] < 1 << 31)


class CropTable:
    """Images held so that any crop of any image, flipped or not, is one copy of adjacent bytes.

    Each row is followed by 4 zeros and each image by 4 rows of zeros: what pads one row on the right
    pads the next on the left, and the same from image to image. So a crop is a run of bytes that
    starts at its corner, `height` rows long, with 4 columns to drop. All images are held a second
    time, mirrored. The table takes 2.5 times the memory of 32 x 32 images (CIFAR: 389 MB).

    Channels-last images are one plane of 3-byte pixels, others 3 planes of 1-byte pixels.
    """

    def __init__(self, images_NCHW: Tensor, device: torch.device, channels_last: bool) -> None:
        """Copy uint8 images into a table on `device`; the images are not kept."""
        self.num_images, channels, self.height, self.width = images_NCHW.shape
        self.planes, self.pixel_bytes = (1, channels) if channels_last else (channels, 1)
        self.row = self.width + PADDING
        self.plane = (self.height + PADDING) * self.row
        lead = PADDING * self.row + PADDING
        num_planes = 2 * self.num_images * self.planes
        pixels = torch.zeros(
            (lead + num_planes * self.plane + PADDING, self.pixel_bytes), dtype=torch.uint8, device=device
        )
        body = pixels[lead:-PADDING].view(2, self.num_images, self.planes, -1, self.row, self.pixel_bytes)
        planes = images_NCHW.permute(0, 2, 3, 1).unsqueeze(1) if channels_last else images_NCHW.unsqueeze(-1)
        body[0, :, :, : self.height, : self.width] = planes
        body[1, :, :, : self.height, : self.width] = body[0, :, :, : self.height, : self.width].flip(3)
        self.pixels = pixels

    def locate(self, sample_ids_B: Tensor, crops: Crops) -> Tensor:
        """Where each crop begins in the table: int64 `[V, B, planes]`, in pixels."""
        image_VB = crops.flip_VB * self.num_images + sample_ids_B
        # In the mirrored image the crop that began `left` from the left ends so far from the right.
        left_VB = torch.where(crops.flip_VB, 2 * PADDING - crops.left_VB, crops.left_VB)
        corner_VB = image_VB * (self.planes * self.plane) + crops.top_VB * self.row + left_VB
        return corner_VB.unsqueeze(-1) + torch.arange(self.planes, device=self.pixels.device) * self.plane

    def read(self, starts_VBP: Tensor) -> Tensor:
        """The crops that begin there: uint8 `[V * B, C, H, W]`, each image with 4 gaps a row in memory."""
        length = self.height * self.row
        # Entry i of this view is the run that begins at pixel i: the runs overlap, and only those
        # that are selected are ever copied.
        runs = self.pixels.as_strided(
            (len(self.pixels) - length + 1, length * self.pixel_bytes), (self.pixel_bytes, 1)
        )
        rows = runs.index_select(0, starts_VBP.flatten())
        rows = rows.view(-1, self.planes, self.height, self.row, self.pixel_bytes)[:, :, :, : self.width]
        return rows.squeeze(1).permute(0, 3, 1, 2) if self.planes == 1 else rows.squeeze(-1)


class Normaliser:
    """Turns uint8 pixels into float32 `(pixel / 255 - mean) / std`, dense in the layout it is made for.

    The operations and their order are those of torchvision's `to_tensor` and `normalize`. All are
    correctly rounded, so every device gives the same bits.
    """

    def __init__(
        self, normalisation: Normalisation, size: tuple[int, int], device: torch.device, channels_last: bool
    ) -> None:
        """`size` is (height, width) of the images to come."""
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        # Whole images of means and deviations: a broadcast over 3 interleaved channels is 10 times slower.
        self.mean_1CHW = self._image(normalisation.mean, size).to(device)
        self.std_1CHW = self._image(normalisation.std, size).to(device)
        # A tensor, because CUDA multiplies by the rounded inverse of a number.
        self.scale = torch.tensor(255.0, device=device)

    def __call__(self, pixels_BCHW: Tensor) -> Tensor:
        """Normalise uint8 `[B, C, H, W]` of any layout to float32 of the layout chosen."""
        images_BCHW = pixels_BCHW.to(torch.float32, memory_format=self.memory_format)
        return images_BCHW.div_(self.scale).sub_(self.mean_1CHW).div_(self.std_1CHW)

    def _image(self, values: tuple[float, ...], size: tuple[int, int]) -> Tensor:
        image = torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1).expand(-1, -1, *size)
        return image.clone(memory_format=self.memory_format)


def cifar_views(
    table: CropTable,
    normalise: Normaliser,
    sample_ids_B: Tensor,
    num_views: int,
    seed: int,
    epoch: int | Tensor,
) -> Tensor:
    """Every view of the samples, augmented and normalised: float32 `[V, B, C, H, W]`.

    The flattened views `[V * B, C, H, W]` are dense in the layout of `table` and `normalise`. All
    tensors are on one device and nothing synchronises, so this can be captured in a CUDA graph with
    `sample_ids_B` and `epoch` as its inputs.
    """
    crops = draw_crops(sample_ids_B, num_views, seed, epoch)
    return normalise(table.read(table.locate(sample_ids_B, crops))).unflatten(0, (num_views, -1))
