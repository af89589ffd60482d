"""What a loader hands over is looked at once, and each thing that can be wrong with it has its own words."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from pcl_fast.contract import EvalBatch, ViewBatch
from pcl_fast.errors import DataError
from pcl_fast.first_batch import CheckedEvalLoader, check_images, check_views, checked

VIEWS, IMAGES, CLASSES = 2, 4, 10
CPU = torch.device("cpu")
IDS = torch.arange(IMAGES)


def good_batch() -> ViewBatch:
    return ViewBatch(torch.randn(VIEWS, IMAGES, 3, 8, 8), torch.tensor([0, 9, 3, 3]), IDS + 90)


def with_value(tensor: Tensor, place: tuple[int, ...], value: float) -> Tensor:
    changed = tensor.clone()
    changed[place] = value
    return changed


NAN_AT, INF_AT = (1, 2, 0, 5, 5), (0, 3, 2, 7, 0)
Change = Callable[[ViewBatch], dict[str, Any]]
WRONG: dict[str, tuple[Change, str]] = {
    "bytes": (
        lambda b: {"views_VBCHW": b.views_VBCHW.byte()},
        "images of torch.uint8: they must be torch.float32",
    ),
    "doubles": (lambda b: {"views_VBCHW": b.views_VBCHW.double()}, "images of torch.float64"),
    "one view too few": (
        lambda b: {"views_VBCHW": b.views_VBCHW[:1]},
        "1 views of every image: it must make 2",
    ),
    "no views": (lambda b: {"views_VBCHW": b.views_VBCHW[:0]}, "views of shape [0, 4, 3, 8, 8]"),
    "no images": (lambda b: {"views_VBCHW": b.views_VBCHW[:, :0]}, "views of shape [2, 0, 3, 8, 8]"),
    "no view dimension": (lambda b: {"views_VBCHW": b.views_VBCHW[0]}, "views of shape [4, 3, 8, 8]"),
    "channels last": (
        lambda b: {"views_VBCHW": b.views_VBCHW.permute(0, 1, 3, 4, 2)},
        "views of shape [2, 4, 8, 8, 3]: it must be [views, images, 3, height, width]",
    ),
    "float labels": (
        lambda b: {"labels_B": b.labels_B.float()},
        "labels of torch.float32: they must be torch.int64",
    ),
    "short labels": (lambda b: {"labels_B": b.labels_B.short()}, "labels of torch.int16"),
    "labels of fewer": (lambda b: {"labels_B": b.labels_B[:3]}, "labels of shape [3]: it must be [4]"),
    "one-hot labels": (lambda b: {"labels_B": torch.eye(4).long()}, "labels of shape [4, 4]"),
    "label too great": (
        lambda b: {"labels_B": with_value(b.labels_B, (1,), 10)},
        "the label 10: labels of 10 classes are 0 to 9",
    ),
    "label negative": (lambda b: {"labels_B": with_value(b.labels_B, (2,), -1)}, "the label -1"),
    "NaN": (
        lambda b: {"views_VBCHW": with_value(b.views_VBCHW, NAN_AT, float("nan"))},
        "pixels that are not finite, in image 2 of the batch",
    ),
    "infinite": (
        lambda b: {"views_VBCHW": with_value(b.views_VBCHW, INF_AT, float("-inf"))},
        "pixels that are not finite, in image 3 of the batch",
    ),
    "elsewhere": (lambda b: {"views_VBCHW": b.views_VBCHW.to("meta")}, "images on meta: training is on cpu"),
    "labels elsewhere": (lambda b: {"labels_B": b.labels_B.to("meta")}, "labels on meta: training is on cpu"),
}
WRONG_IDS: dict[str, tuple[Change, str]] = {
    "ids of another type": (lambda b: {"sample_ids_B": b.sample_ids_B.int()}, "sample ids of torch.int32"),
    "ids of fewer": (
        lambda b: {"sample_ids_B": b.sample_ids_B[:2]},
        "sample ids of shape [2]: it must be [4]",
    ),
    "id negative": (lambda b: {"sample_ids_B": b.sample_ids_B - 91}, "the sample id -1: ids begin at 0"),
}


def message_of(check: Callable[[], None]) -> str:
    with pytest.raises(DataError) as caught:
        check()
    message = str(caught.value)
    assert message.startswith("the first batch of the loader has ")
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", [*WRONG, *WRONG_IDS])
def test_each_violation_of_a_training_batch_is_named(name: str) -> None:
    change, words = (WRONG | WRONG_IDS)[name]
    batch = good_batch()
    bad = dataclasses.replace(batch, **change(batch))
    assert words in message_of(lambda: check_views(bad, VIEWS, CLASSES, CPU))


@pytest.mark.parametrize("name", [name for name in WRONG if "view" not in name])
def test_each_violation_of_an_evaluation_batch_is_named(name: str) -> None:
    change, words = WRONG[name]
    batch = good_batch()
    bad = dataclasses.replace(batch, **change(batch))
    # The image that is wrong may be in any view: all of them are shown as one batch.
    images = bad.views_VBCHW[1] if name != "infinite" else bad.views_VBCHW[0]
    words = words.replace("views of shape [2, ", "images of shape [").replace("[views, ", "[")
    assert words in message_of(lambda: check_images(EvalBatch(images, bad.labels_B), CLASSES, CPU))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_as_agreed_passes(dtype: torch.dtype) -> None:
    batch = good_batch()
    views = batch.views_VBCHW.to(dtype).flatten(0, 1).to(memory_format=torch.channels_last)
    batch = dataclasses.replace(batch, views_VBCHW=views.unflatten(0, (VIEWS, IMAGES)))
    check_views(batch, VIEWS, CLASSES, CPU)
    check_images(EvalBatch(batch.views_VBCHW[0], batch.labels_B), CLASSES, CPU)


def test_only_the_first_batch_is_looked_at_and_all_are_handed_on() -> None:
    seen: list[int] = []
    closed: list[bool] = []

    def numbers() -> Iterator[Any]:
        try:
            yield from range(4)
        finally:
            closed.append(True)

    iterator: Any = checked(numbers(), seen.append)
    assert [next(iterator), next(iterator)] == [0, 1]
    iterator.close()
    assert (seen, closed) == ([0], [True])


def test_every_pass_of_an_evaluation_is_looked_at() -> None:
    class Loader:
        num_samples = IMAGES

        def __iter__(self) -> Iterator[EvalBatch]:
            batch = good_batch()
            yield EvalBatch(batch.views_VBCHW[0], batch.labels_B + self.shift)

        shift = 0

    loader = Loader()
    checked_loader = CheckedEvalLoader(loader, CLASSES, CPU)
    assert checked_loader.num_samples == IMAGES
    assert len(list(checked_loader)) == 1
    loader.shift = 5
    with pytest.raises(DataError, match="the label 14"):
        list(checked_loader)
