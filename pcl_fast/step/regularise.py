"""What a step does to a batch before any network sees it: mixup, and labels that are softened."""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from pcl_fast.config import Config
from pcl_fast.contract import ViewBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class Regularisation:
    """Makes of a batch another one, whose labels are soft: a row of weights for each image, [B, C].

    Mixup (Zhang et al., ICLR 2018): image b of a batch of B becomes lambda times itself plus 1 - lambda times
    image B - 1 - b, and its label likewise. Batches are shuffled, so pairs are random; they are the same in
    every view, as the label is one. Label smoothing: 1 - `smoothing` is on the label, the rest on all
    classes alike.
    """

    num_classes: int
    smoothing: float = 0.0
    mixes: bool = False

    def __call__(self, batch: ViewBatch, mixup: Tensor) -> ViewBatch:
        """The batch with soft labels; lambda is `mixup`, a float64 scalar on the device.

        Operations on the device only. Labels are float32, or float64 where the views are.
        """
        views_VBCHW = batch.views_VBCHW
        labels_BC = self._softened(batch.labels_B, torch.promote_types(views_VBCHW.dtype, torch.float32))
        if self.mixes:
            # One rounding for both: labels say what is in the views, whatever their precision.
            share = mixup.to(views_VBCHW.dtype)
            views_VBCHW = torch.lerp(views_VBCHW.flip(1), views_VBCHW, share)
            labels_BC = torch.lerp(labels_BC.flip(0), labels_BC, share.to(labels_BC.dtype))
        return dataclasses.replace(batch, views_VBCHW=views_VBCHW, labels_B=labels_BC)

    def _softened(self, labels_B: Tensor, dtype: torch.dtype) -> Tensor:
        onehot_BC = torch.arange(self.num_classes, device=labels_B.device) == labels_B[:, None]
        rest = self.smoothing / self.num_classes
        return onehot_BC.to(dtype) * (1 - self.smoothing) + rest


def make_regularisation(config: Config) -> Regularisation | None:
    """What the configuration asks for; None where that is nothing."""
    train = config.train
    if train.label_smoothing == 0 and train.mixup == 0:
        return None
    return Regularisation(
        num_classes=config.data.classes, smoothing=train.label_smoothing, mixes=train.mixup > 0
    )
