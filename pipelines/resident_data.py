"""What a data set that is to lie in the device's memory must be."""

import torch
from torch import Tensor

from pcl_fast.errors import DataError


def check_data(images_NCHW: Tensor, labels_N: Tensor, channels: int, num_classes: int) -> None:
    """Refuse a data set that is empty, or whose images or labels are not as they must be.

    Raises:
        DataError: naming what was found and what is needed.
    """
    shape = list(images_NCHW.shape)
    if images_NCHW.dtype != torch.uint8:
        raise DataError(f"the images are {images_NCHW.dtype}: they must be torch.uint8, 0 to 255")
    if images_NCHW.ndim != 4 or shape[1] != channels:
        raise DataError(f"the images have shape {shape}: it must be [samples, {channels}, height, width]")
    if shape[0] == 0:
        raise DataError("the data set is empty: it has no images")
    if images_NCHW.numel() == 0:
        raise DataError(f"the images have shape {shape}: they have no pixels")
    if labels_N.dtype != torch.int64:
        raise DataError(f"the labels are {labels_N.dtype}: they must be torch.int64")
    if labels_N.shape != images_NCHW.shape[:1]:
        raise DataError(
            f"the labels have shape {list(labels_N.shape)}: it must be [{shape[0]}], one an image"
        )
    outside_N = (labels_N < 0) | (labels_N >= num_classes)
    if outside_N.any():
        where = int(outside_N.nonzero()[0])
        raise DataError(
            f"sample {where} has label {int(labels_N[where])}: "
            f"labels of {num_classes} classes are 0 to {num_classes - 1}"
        )
