"""The CIFAR backbones: small networks for 32x32 images, `f(num_classes) -> nn.Module`.

Their stages are called `stage1`, `stage2`, ... (DenseNet: `block1` to `block3`) and their last layer
`classifier`, so a network is cut into trunk and branch by the name of the stage the branch begins with.
Input [B, 3, 32, 32], output logits [B, num_classes].
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

BlockBuilder = Callable[[int, int, int], nn.Module]  # (in_channels, width, stride) -> block
EXPANSION = 4


def conv_norm(in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    """A "same"-padded convolution without bias, and its BatchNorm."""
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, bias=False)
    return [conv, nn.BatchNorm2d(out_channels)]


def shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """The identity, or a 1x1 convolution and BatchNorm where the shape changes."""
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return nn.Sequential(*conv_norm(in_channels, out_channels, 1, stride))


class Residual(nn.Module):
    """relu(body(x) + shortcut(x)), the block of He et al., arXiv 1512.03385."""

    def __init__(self, body: Sequence[nn.Module], shortcut: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*body)
        self.shortcut = shortcut
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, in, H, W] to [B, out, H / stride, W / stride]."""
        return self.relu(self.body(x) + self.shortcut(x))


def basic_block(in_channels: int, width: int, stride: int) -> nn.Module:
    """Two 3x3 convolutions; `width` channels out."""
    body = [*conv_norm(in_channels, width, 3, stride), nn.ReLU(inplace=True), *conv_norm(width, width, 3)]
    return Residual(body, shortcut(in_channels, width, stride))


def bottleneck(in_channels: int, width: int, stride: int, widen: int = 1) -> nn.Module:
    """1x1, 3x3, 1x1 convolutions, `width * widen` channels inside and `4 * width` out."""
    inner, out_channels = width * widen, width * EXPANSION
    body = [
        *conv_norm(in_channels, inner, 1),
        nn.ReLU(inplace=True),
        *conv_norm(inner, inner, 3, stride),
        nn.ReLU(inplace=True),
        *conv_norm(inner, out_channels, 1),
    ]
    return Residual(body, shortcut(in_channels, out_channels, stride))


def wide_bottleneck(in_channels: int, width: int, stride: int) -> nn.Module:
    """A bottleneck whose inside is eight times as wide."""
    return bottleneck(in_channels, width, stride, widen=8)


def initialise(network: nn.Module) -> nn.Module:
    """Draw He's normal weights (fan out) for the convolutions; BatchNorm starts as the identity."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
    return network


class CifarResNet(nn.Module):
    """Stem, three stages of `depth` residual blocks with widths 16, 32, 64, mean over pixels, classifier."""

    def __init__(self, block: BlockBuilder, depth: int, num_classes: int, expansion: int = 1) -> None:
        super().__init__()
        self.stem = nn.Sequential(*conv_norm(3, 16, 3), nn.ReLU(inplace=True))
        self.stage1 = residual_stage(block, depth, 16, 16, 16 * expansion)
        self.stage2 = residual_stage(block, depth, 16 * expansion, 32, 32 * expansion)
        self.stage3 = residual_stage(block, depth, 32 * expansion, 64, 64 * expansion)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(64 * expansion, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, num_classes] of images [B, 3, 32, 32]."""
        x = self.stage3(self.stage2(self.stage1(self.stem(x))))
        return self.classifier(self.pool(x).flatten(1))


def residual_stage(
    block: BlockBuilder, depth: int, in_channels: int, width: int, out_channels: int
) -> nn.Sequential:
    """`depth` blocks; the first halves the image, except in the stage of width 16."""
    first = block(in_channels, width, 1 if width == 16 else 2)
    return nn.Sequential(first, *(block(out_channels, width, 1) for _ in range(depth - 1)))


def vgg_stage(in_channels: int, out_channels: int, depth: int) -> nn.Sequential:
    """`depth` 3x3 convolutions with BatchNorm and ReLU, then a pooling that halves the image."""
    layers: list[nn.Module] = []
    for index in range(depth):
        layers += conv_norm(in_channels if index == 0 else out_channels, out_channels, 3)
        layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers, nn.MaxPool2d(2))


class CifarVgg(nn.Module):
    """VGG-16 with BatchNorm (Simonyan and Zisserman, arXiv 1409.1556) and a head of width 512.

    The convolutions have no bias: the BatchNorm behind each takes its mean out again.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stage1 = vgg_stage(3, 64, 2)
        self.stage2 = vgg_stage(64, 128, 2)
        self.stage3 = vgg_stage(128, 256, 3)
        self.stage4 = vgg_stage(256, 512, 3)
        self.stage5 = vgg_stage(512, 512, 3)
        self.head = nn.Sequential(
            nn.Linear(512, 512), nn.ReLU(inplace=True), nn.Linear(512, 512), nn.ReLU(inplace=True)
        )
        self.classifier = nn.Linear(512, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, num_classes] of images [B, 3, 32, 32]."""
        x = self.stage5(self.stage4(self.stage3(self.stage2(self.stage1(x)))))
        return self.classifier(self.head(x.flatten(1)))


def norm_relu_conv(in_channels: int, out_channels: int, kernel: int) -> list[nn.Module]:
    """BatchNorm, ReLU, then a convolution: DenseNet's order."""
    conv = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, bias=False)
    return [nn.BatchNorm2d(in_channels), nn.ReLU(inplace=True), conv]


class DenseLayer(nn.Module):
    """Appends `growth` new channels to its input, through a 1x1 bottleneck of `4 * growth` channels."""

    def __init__(self, in_channels: int, growth: int) -> None:
        super().__init__()
        inner = 4 * growth
        self.body = nn.Sequential(*norm_relu_conv(in_channels, inner, 1), *norm_relu_conv(inner, growth, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, in, H, W] to [B, in + growth, H, W]."""
        return torch.cat([x, self.body(x)], dim=1)


class CifarDenseNet(nn.Module):
    """DenseNet-BC (Huang et al., arXiv 1608.06993): three blocks, compression 0.5 between them."""

    def __init__(self, depth: int, growth: int, num_classes: int) -> None:
        super().__init__()
        widths = [2 * growth]
        for _ in range(2):
            widths.append((widths[-1] + depth * growth) // 2)
        self.stem = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.block1 = dense_block(widths[0], depth, growth)
        self.transition1 = transition(widths[0] + depth * growth, widths[1])
        self.block2 = dense_block(widths[1], depth, growth)
        self.transition2 = transition(widths[1] + depth * growth, widths[2])
        self.block3 = dense_block(widths[2], depth, growth)
        features = widths[2] + depth * growth
        self.norm = nn.BatchNorm2d(features)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(features, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, num_classes] of images [B, 3, 32, 32]."""
        x = self.transition1(self.block1(self.stem(x)))
        x = self.block3(self.transition2(self.block2(x)))
        return self.classifier(self.pool(self.relu(self.norm(x))).flatten(1))


def dense_block(in_channels: int, depth: int, growth: int) -> nn.Sequential:
    """`depth` dense layers, `in_channels + depth * growth` channels out."""
    return nn.Sequential(*(DenseLayer(in_channels + index * growth, growth) for index in range(depth)))


def transition(in_channels: int, out_channels: int) -> nn.Sequential:
    """Fewer channels, then half the image."""
    return nn.Sequential(*norm_relu_conv(in_channels, out_channels, 1), nn.AvgPool2d(2))


def resnet8(num_classes: int) -> nn.Module:
    """ResNet of BasicBlocks [1, 1, 1], for tests and quick looks. Feature 64."""
    return CifarResNet(basic_block, 1, num_classes)


def resnet20(num_classes: int) -> nn.Module:
    """ResNet-20: BasicBlocks [3, 3, 3]. Feature 64."""
    return CifarResNet(basic_block, 3, num_classes)


def resnet32(num_classes: int) -> nn.Module:
    """ResNet-32: BasicBlocks [5, 5, 5]. Feature 64."""
    return CifarResNet(basic_block, 5, num_classes)


def resnet110(num_classes: int) -> nn.Module:
    """The ResNet-110 of the distillation papers: Bottlenecks [12, 12, 12], expansion 4. Feature 256."""
    return CifarResNet(bottleneck, 12, num_classes, EXPANSION)


def resnet110_basic(num_classes: int) -> nn.Module:
    """The ResNet-110 of He et al.: BasicBlocks [18, 18, 18]. Feature 64."""
    return CifarResNet(basic_block, 18, num_classes)


def wrn20_8(num_classes: int) -> nn.Module:
    """WRN-20-8 of the distillation papers: Bottlenecks [2, 2, 2], eight times as wide inside. Feature 256."""
    return CifarResNet(wide_bottleneck, 2, num_classes, EXPANSION)


def vgg16(num_classes: int) -> nn.Module:
    """VGG-16 with BatchNorm. Feature 512, before the head."""
    return CifarVgg(num_classes)


def densenet40_12(num_classes: int) -> nn.Module:
    """DenseNet-BC-40-12: blocks of 6 layers, growth 12. Feature 132."""
    return CifarDenseNet(6, 12, num_classes)
