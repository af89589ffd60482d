"""Which images there are, where they lie and what they show: folders, ImageNet, CIFAR."""
