"""BatchNorm that sees one view at a time, while the trunk runs all views as one batch.

Input [V * B, C, H, W], view after view. Each view is normalised by its own mean and variance, and the
running statistics take V momentum updates a step, in view order: what V calls of nn.BatchNorm2d do. The
addition of a residual and the ReLU that often follow can be part of the call.

Three ways, equal in value and gradients. On the CPU, where they fit: our kernels, which do all of it in one,
perhaps with the convolution before it. Eager elsewhere: torch's own kernel on one view after the other,
written into slices of one output, which spares the forward pass a concatenation; backward, each view's
gradient is copied into place once. Compiled: a formula in plain operations, which the compiler fuses; eager
it is many times slower. A fourth, in plain operations, takes its statistics over the batches of all ranks.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase  # pyright: ignore[reportPrivateUsage]
from torch.nn.modules.instancenorm import _InstanceNorm  # pyright: ignore[reportPrivateUsage]

from pcl_fast.errors import ConfigError
from pcl_fast.kernels import conv_norm, norm_act
from pcl_fast.kernels.norm_act import NormState
from pcl_fast.kernels.residual_blocks import ResidualBlock, residual_blocks, takes_blocks
from pcl_fast.models.sync_norm import SumOverRanks, normalise_over_ranks
from pcl_fast.models.view_statistics import has_kernel, normalise_by_formula, normalise_slices


class ViewBatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d over `num_views` views stacked along the batch, each by its own statistics.

    Its state dict is the same. `use_kernels` permits our kernels; without them, with one view, and in eval
    mode, it is nn.BatchNorm2d to the bit. `conv` is a convolution to do first, for the kernel that does both;
    it stays a module of its own elsewhere (`fuse.attach_convolutions`). `blocks` is a chain of residual
    blocks that ends here, each given by its two norms, and its shortcut's if it has one: a call without a
    residual runs all of it (`fuse.chain_blocks`). `calls` is how often a forward of the network calls it;
    unless it `counts`, batches are counted elsewhere (`PeerNetwork.count_together`). `sum_over_ranks`, which
    adds a tensor up over all ranks in place, makes training statistics those of all ranks' batches together
    (`synchronise`), without kernels. Raises ConfigError where a view holds a single value a channel, which
    has no variance.
    """

    num_views: int = 1
    calls: int = 1
    counts: bool = True
    use_kernels: bool = False
    conv: tuple[nn.Conv2d] | None = None  # in a tuple, so as not to be a submodule here, too
    blocks: tuple[tuple["ViewBatchNorm2d", ...], ...] = ()
    sum_over_ranks: SumOverRanks | None = None

    @classmethod
    def like(cls, norm: nn.BatchNorm2d) -> "ViewBatchNorm2d":
        """A layer that takes the place of `norm`, holding the same parameters and buffers."""
        layer = cls(norm.num_features, norm.eps, norm.momentum, norm.affine, device="meta")
        layer.weight, layer.bias = norm.weight, norm.bias
        layer.running_mean, layer.running_var = norm.running_mean, norm.running_var
        layer.num_batches_tracked = norm.num_batches_tracked
        return layer.train(norm.training)

    def forward(self, input: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        """Convolve, if `conv` is set; normalise [V * B, C, H, W]; add `residual`; cut off below zero."""
        if self.blocks and residual is None:
            return self._run_blocks(input)
        kernels = self._may_use_kernels()
        options = (residual, relu, self.num_views)
        if self.conv is not None:
            conv = self._conv_state()
            if kernels and _autocasts() and conv_norm.takes(input, conv, self.weight, residual):
                self._count_views(input.numel() // input.shape[1] // conv.stride**2)
                return conv_norm.conv_norm_act(input, conv, self._state(), *options)
            input = self.conv[0](input)
        if kernels and norm_act.takes(input, self.weight, residual):
            self._count_views(input.numel() // input.shape[1])
            return norm_act.norm_act(input, self._state(), *options)
        out = self._normalise(input)
        if residual is not None:
            out = out + residual
        return out.relu_() if relu else out

    def _run_blocks(self, x: Tensor) -> Tensor:
        norms = [norm for block in self.blocks for norm in block]
        if (
            all(norm._may_use_kernels() and norm.num_views == self.num_views for norm in norms)
            and _autocasts()
        ):
            layers = [[(norm._conv_state(), norm._state()) for norm in block] for block in self.blocks]
            chain = [ResidualBlock(*first, *second, *more) for first, second, *more in layers]
            if takes_blocks(x, chain):
                for norm in norms:
                    norm._count_views(x.numel() // x.shape[1])
                return residual_blocks(x, chain, self.num_views)
        for first, second, *shortcut in self.blocks:
            residual = shortcut[0](x) if shortcut else x
            x = second(first(x, relu=True), residual, relu=True)
        return x

    def _may_use_kernels(self) -> bool:
        allowed = self.use_kernels and self.sum_over_ranks is None
        return self.training and allowed and not torch.compiler.is_compiling()

    def _normalise(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        if self.sum_over_ranks is not None:
            self._note_views()  # how many values a view has, the other ranks know, too
            return normalise_over_ranks(input, self, self.num_views, self.sum_over_ranks)
        self._count_views(input.numel() // self.num_features)
        if self.num_views == 1:
            assert self.momentum is not None
            buffers = self.running_mean, self.running_var
            return F.batch_norm(input, *buffers, self.weight, self.bias, True, self.momentum, self.eps)
        if torch.compiler.is_compiling() or not has_kernel(input, self.weight):
            return normalise_by_formula(input, self, self.num_views)
        return normalise_slices(input, self, self.num_views)

    def _count_views(self, values: int) -> None:
        if values < 2 * self.num_views:
            raise ConfigError("a view of one image of one pixel has no statistics; use a batch of 2 or more.")
        self._note_views()

    def _note_views(self) -> None:
        if self.counts:
            assert self.num_batches_tracked is not None
            self.num_batches_tracked.add_(self.num_views)

    def _conv_state(self) -> conv_norm.ConvState:
        assert self.conv is not None
        return conv_norm.ConvState(self.conv[0].weight, self.conv[0].stride[0])

    def _state(self) -> NormState:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.momentum is not None
        buffers = self.running_mean, self.running_var
        return NormState(self.weight, self.bias, *buffers, self.momentum, self.eps)


class ViewBatchNormAct2d(ViewBatchNorm2d):
    """The same followed by dropout and activation: takes the place of timm's BatchNormAct2d."""

    drop: nn.Module
    act: nn.Module

    @classmethod
    def like(cls, norm: nn.BatchNorm2d) -> "ViewBatchNormAct2d":
        """A layer that takes the place of `norm`, holding the same parameters, buffers and activation."""
        layer = super().like(norm)
        layer.drop, layer.act = norm.get_submodule("drop"), norm.get_submodule("act")
        return layer  # pyright: ignore[reportReturnType]

    def forward(self, input: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        """Normalise [V * B, C, H, W], then drop and activate."""
        return self.act(self.drop(super().forward(input, residual, relu)))


def convert_batch_norm(module: nn.Module) -> bool:
    """Put a per-view layer in the place of every BatchNorm2d in `module`; True where that suffices.

    False, and nothing changed, where a layer mixes views in a way only running view by view keeps apart:
    another kind of BatchNorm, one without running statistics or with a cumulative average.
    """
    layers = dict(module.named_modules(remove_duplicate=False))
    if any(_mixes_views(layer) for layer in layers.values()):
        return False
    made: dict[nn.Module, ViewBatchNorm2d] = {}  # a layer used under two names stays one layer
    for name, layer in layers.items():
        if _is_batch_norm_act(layer):
            module.set_submodule(name, made.setdefault(layer, ViewBatchNormAct2d.like(layer)))  # pyright: ignore
        elif type(layer) is nn.BatchNorm2d:
            module.set_submodule(name, made.setdefault(layer, ViewBatchNorm2d.like(layer)))
    return True


def set_num_views(module: nn.Module, num_views: int) -> None:
    """Tell every per-view layer in `module` how many views its next inputs hold."""
    for layer in module.modules():
        if isinstance(layer, ViewBatchNorm2d):
            layer.num_views = num_views


def allow_kernels(module: nn.Module) -> None:
    """Let the per-view layers in `module` use our kernels where they fit."""
    for layer in module.modules():
        if isinstance(layer, ViewBatchNorm2d):
            layer.use_kernels = True


def synchronise(module: nn.Module, sum_over_ranks: SumOverRanks) -> None:
    """Let every BatchNorm in `module` take its training statistics over the batches of all ranks, per view.

    `sum_over_ranks` adds a tensor up over ranks, in place; all ranks call it as often, in the same order.
    A copy of the module wants a call of its own: copying what has it copies that, too. Raises ConfigError
    naming a layer that mixes views in another way, and changes nothing then.
    """
    layers = dict(module.named_modules())
    for name, layer in layers.items():
        if _mixes_views(layer):
            raise ConfigError(
                f"--sync-bn: layer '{name}' is a {type(layer).__name__} with statistics that cannot be those "
                "of all ranks; leave out --sync-bn, or replace the layer"
            )
    for layer in layers.values():
        if isinstance(layer, ViewBatchNorm2d):
            layer.sum_over_ranks = sum_over_ranks


def _autocasts() -> bool:
    return torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16


def _mixes_views(layer: nn.Module) -> bool:
    if not isinstance(layer, _NormBase):
        return False
    if isinstance(layer, _InstanceNorm):
        return layer.track_running_stats
    known = type(layer) is nn.BatchNorm2d or _is_batch_norm_act(layer) or isinstance(layer, ViewBatchNorm2d)
    return not known or layer.momentum is None or not layer.track_running_stats


def _is_batch_norm_act(layer: nn.Module) -> bool:
    """Known by name, as timm need not be installed."""
    kind = type(layer)
    return kind.__name__ == "BatchNormAct2d" and kind.__module__.startswith("timm.")
