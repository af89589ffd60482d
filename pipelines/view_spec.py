"""What views are to be like, whoever makes them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pcl_fast.errors import ConfigError
from pipelines.normalisation import Normalisation

COLOURS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewSpec:
    """The size, type and layout of views: float32 or bfloat16, `size` x `size` pixels, normalised.

    `channels` is 3, or, channels-last only, 4 or 8: zeros follow the colours.
    """

    normalisation: Normalisation
    size: int = 224
    dtype: torch.dtype = torch.float32
    channels_last: bool = True
    channels: int = COLOURS

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ConfigError(f"views of {self.size} pixels cannot be made: give at least 1")
        if self.dtype not in (torch.float32, torch.bfloat16):
            raise ConfigError(f"views cannot be {self.dtype}: give torch.float32 or torch.bfloat16")
        if self.channels not in ((3, 4, 8) if self.channels_last else (3,)):
            raise ConfigError(
                f"views cannot have {self.channels} channels: give 3, or, channels-last, 4 or 8"
            )

    @property
    def scale_and_shift(self) -> tuple[list[float], list[float]]:
        """For each colour the numbers that make (pixel / 255 - mean) / std of pixel * scale + shift."""
        mean, std = self.normalisation.mean, self.normalisation.std
        return [1 / (255 * s) for s in std], [-m / s for m, s in zip(mean, std, strict=True)]

    def empty(self, views: int, batch: int, device: torch.device) -> Tensor:
        """Memory for views [V, B, C, S, S] whose flattening [V * B, C, S, S] is dense in the layout."""
        if self.channels_last:
            shape = (views, batch, self.size, self.size, self.channels)
            return torch.empty(shape, dtype=self.dtype, device=device).permute(0, 1, 4, 2, 3)
        shape = (views, batch, self.channels, self.size, self.size)
        return torch.empty(shape, dtype=self.dtype, device=device)

    def takes(self, views_VBCSS: Tensor) -> bool:
        """Whether a tensor has this size, type and layout."""
        views, batch = views_VBCSS.shape[:2]
        like = self.empty(views, batch, torch.device("meta"))
        return views_VBCSS.dtype == self.dtype and (views_VBCSS.shape, views_VBCSS.stride()) == (
            like.shape,
            like.stride(),
        )
