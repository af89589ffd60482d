"""3x3 convolutions that use our kernel on the CPU where it fits."""

import torch
from torch import Tensor, nn

from pcl_fast.kernels.conv3x3 import conv3x3, fits, takes


class Conv3x3(nn.Conv2d):
    """nn.Conv2d of kernel 3, stride 1 and padding 1, without bias; its state dict is the same.

    Under bfloat16 autocast on the CPU, and where it fits, our kernel computes it; else torch.
    """

    @classmethod
    def like(cls, conv: nn.Conv2d) -> "Conv3x3":
        """A layer that takes the place of `conv`, holding the same weight."""
        layer = cls(conv.in_channels, conv.out_channels, 3, padding=1, bias=False, device="meta")
        layer.weight = conv.weight
        return layer.train(conv.training)

    def forward(self, input: Tensor) -> Tensor:
        """Map [B, I, H, W] to [B, O, H, W]."""
        eager = not torch.compiler.is_compiling()
        if eager and torch.is_autocast_enabled("cpu") and takes(input, self.weight):
            return conv3x3(input, self.weight)
        return super().forward(input)


def convert_convs(module: nn.Module) -> None:
    """Put a `Conv3x3` in the place of every convolution in `module` that it can stand in for."""
    made: dict[nn.Module, Conv3x3] = {}  # a layer used under two names stays one layer
    for name, layer in list(module.named_modules(remove_duplicate=False)):
        if type(layer) is nn.Conv2d and _can_stand_in(layer):
            module.set_submodule(name, made.setdefault(layer, Conv3x3.like(layer)))


def _can_stand_in(conv: nn.Conv2d) -> bool:
    shape = (conv.kernel_size, conv.stride, conv.dilation) == ((3, 3), (1, 1), (1, 1))
    plain = conv.groups == 1 and conv.bias is None and conv.padding_mode == "zeros"
    return shape and plain and conv.padding in ((1, 1), "same") and fits(conv.in_channels, conv.out_channels)
