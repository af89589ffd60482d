"""The ImageNet backbones of the paper: torchvision's, with new random weights.

Input [B, 3, 224, 224], output logits [B, num_classes].
"""

from torch import nn
from torchvision import models


def resnet18(num_classes: int) -> nn.Module:
    """ResNet-18. Feature 512."""
    return models.resnet18(weights=None, num_classes=num_classes)


def resnet50(num_classes: int) -> nn.Module:
    """ResNet-50. Feature 2048."""
    return models.resnet50(weights=None, num_classes=num_classes)


def resnext50(num_classes: int) -> nn.Module:
    """ResNeXt-50 32x4d. Feature 2048."""
    return models.resnext50_32x4d(weights=None, num_classes=num_classes)
