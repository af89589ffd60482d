"""The resident loaders: determinism, coverage, resume, and what they refuse."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torchvision.transforms import functional as tv

from pcl_fast.contract import EvalLoader, TrainLoader, ViewBatch
from pcl_fast.errors import ConfigError, DataError
from pipelines.augment import NORMALISATIONS
from pipelines.order import epoch_order
from pipelines.resident import EvalOptions, ResidentEvalLoader, ResidentTrainLoader, TrainOptions

CPU = torch.device("cpu")
OPTIONS = TrainOptions(
    batch_size=8,
    num_classes=10,
    normalisation=NORMALISATIONS["cifar10"],
    device=CPU,
    channels_last=False,
    num_views=3,
    seed=7,
    drop_last=True,
)


def data(count: int) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(count)
    images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=draws)
    return images, torch.randint(0, 10, (count,), generator=draws)


def train_loader(count: int = 53, **changes: object) -> ResidentTrainLoader:
    return ResidentTrainLoader(*data(count), replace(OPTIONS, **changes))  # pyright: ignore[reportArgumentType]


def assert_equal(ours: list[ViewBatch], theirs: list[ViewBatch]) -> None:
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one.views_VBCHW, other.views_VBCHW)
        assert torch.equal(one.labels_B, other.labels_B)
        assert torch.equal(one.sample_ids_B, other.sample_ids_B)


def views_by_sample(batches: list[ViewBatch]) -> dict[int, Tensor]:
    ids = torch.cat([b.sample_ids_B for b in batches]).tolist()
    return dict(zip(ids, torch.cat([b.views_VBCHW for b in batches], 1).unbind(1), strict=True))


def test_two_loaders_are_bit_equal_in_any_order_of_epochs() -> None:
    first, second = train_loader(), train_loader()
    epochs = [list(first.epoch(e)) for e in range(3)]
    for epoch in (2, 0, 1):
        assert_equal(list(second.epoch(epoch)), epochs[epoch])


def test_batches_are_as_the_contract_says() -> None:
    loader: TrainLoader = train_loader(53, drop_last=False)
    labels = data(53)[1]
    batches = list(loader.epoch(4))
    assert loader.num_samples == 53
    assert [len(b.labels_B) for b in batches] == [8] * 6 + [5]
    for batch in batches:
        count = len(batch.labels_B)
        assert batch.views_VBCHW.shape == (3, count, 3, 32, 32)
        assert batch.views_VBCHW.dtype == torch.float32
        assert batch.sample_ids_B.dtype == batch.labels_B.dtype == torch.int64
        assert torch.equal(batch.labels_B, labels[batch.sample_ids_B])


@pytest.mark.parametrize("drop_last", [False, True])
def test_every_sample_occurs_once_in_the_order_of_the_epoch(drop_last: bool) -> None:
    loader = train_loader(53, drop_last=drop_last)
    batches = list(loader.epoch(1))
    assert len(batches) == loader.steps_per_epoch == (6 if drop_last else 7)
    ids = torch.cat([b.sample_ids_B for b in batches])
    assert torch.equal(ids, epoch_order(53, 7, 1, CPU)[: 48 if drop_last else 53])


@pytest.mark.parametrize("channels_last", [False, True])
def test_views_do_not_depend_on_batch_size_layout_or_step(channels_last: bool) -> None:
    reference = views_by_sample(list(train_loader(drop_last=False).epoch(3)))
    other = train_loader(drop_last=False, batch_size=5, channels_last=channels_last)
    assert len(reference) == 53
    for sample, views in views_by_sample(list(other.epoch(3))).items():
        assert torch.equal(views, reference[sample])


def test_more_views_leave_the_first_ones_as_they_are() -> None:
    three, five = (next(iter(train_loader(num_views=n).epoch(0))).views_VBCHW for n in (3, 5))
    assert torch.equal(three, five[:3])


def test_views_of_a_sample_differ_between_views_epochs_and_seeds() -> None:
    loader = train_loader(drop_last=False)
    now, later = (views_by_sample(list(loader.epoch(e))) for e in (0, 1))
    elsewhere = views_by_sample(list(train_loader(drop_last=False, seed=8).epoch(0)))
    pairs = [(now[s][0], now[s][1]) for s in now] + [(now[s][0], later[s][0]) for s in now]
    pairs += [(now[s][2], elsewhere[s][2]) for s in now]
    same = sum(torch.equal(one, other) for one, other in pairs)
    assert same <= 6  # of 159 pairs, one is expected to be equal by chance


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("from_end", [False, True])
def test_resume_is_bit_equal(drop_last: bool, from_end: bool) -> None:
    whole = list(train_loader(drop_last=drop_last).epoch(2))
    for distance in (0, 1, 3):
        step = len(whole) - distance if from_end else distance
        assert_equal(list(train_loader(drop_last=drop_last).epoch(2, step)), whole[step:])


def test_channels_last_batches_need_no_copy() -> None:
    batch = next(iter(train_loader(channels_last=True).epoch(0)))
    assert batch.views_VBCHW.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("channels_last", [False, True])
def test_evaluation_covers_every_sample_in_order(channels_last: bool) -> None:
    images, labels = data(103)
    names = ("batch_size", "num_classes", "normalisation", "device")
    options = EvalOptions(**{n: getattr(OPTIONS, n) for n in names}, channels_last=channels_last)
    loader: EvalLoader = ResidentEvalLoader(images, labels, replace(options, batch_size=25))
    for _ in range(2):
        batches = list(loader)
        assert loader.num_samples == 103
        assert [len(b.labels_B) for b in batches] == [25, 25, 25, 25, 3]
        assert torch.equal(torch.cat([b.labels_B for b in batches]), labels)
        ours = torch.cat([b.images_BCHW for b in batches])
        mean, std = NORMALISATIONS["cifar10"].mean, NORMALISATIONS["cifar10"].std
        assert torch.equal(ours, tv.normalize(images / 255, list(mean), list(std)))
        layout = torch.channels_last if channels_last else torch.contiguous_format
        assert all(b.images_BCHW.is_contiguous(memory_format=layout) for b in batches)


GOOD_IMAGES, GOOD_LABELS = data(20)
BAD_DATA = {
    "the data set is empty": (GOOD_IMAGES[:0], GOOD_LABELS[:0]),
    "the images are torch.float32": (GOOD_IMAGES.float(), GOOD_LABELS),
    r"the images have shape \[20, 32, 32, 3\]": (GOOD_IMAGES.permute(0, 2, 3, 1), GOOD_LABELS),
    r"the images have shape \[20, 3072\]": (GOOD_IMAGES.flatten(1), GOOD_LABELS),
    r"the images have shape \[20, 3, 0, 32\]": (GOOD_IMAGES[:, :, :0], GOOD_LABELS),
    "the labels are torch.int32": (GOOD_IMAGES, GOOD_LABELS.int()),
    r"the labels have shape \[19\]: it must be \[20\]": (GOOD_IMAGES, GOOD_LABELS[:19]),
    "sample 2 has label 10: labels of 10 classes are 0 to 9": (
        GOOD_IMAGES,
        torch.where(torch.arange(20) == 2, 10, GOOD_LABELS),
    ),
    "sample 0 has label -1": (GOOD_IMAGES, GOOD_LABELS - 1 - GOOD_LABELS[0]),
}


@pytest.mark.parametrize("message", BAD_DATA)
def test_bad_data_is_refused_by_name(message: str) -> None:
    for loader in (ResidentTrainLoader, ResidentEvalLoader):
        with pytest.raises(DataError, match=message):
            loader(*BAD_DATA[message], OPTIONS)


def test_fewer_samples_than_a_batch() -> None:
    with pytest.raises(DataError, match="5 training samples do not fill one batch of 8"):
        train_loader(5)
    (batch,) = train_loader(5, drop_last=False).epoch(0)
    assert sorted(batch.sample_ids_B.tolist()) == list(range(5))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch size is 0"),
        ({"num_views": 0}, "views is 0"),
        ({"seed": 2**32}, "seed is 4294967296"),
    ],
)
def test_bad_options_are_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        train_loader(**changes)


def test_a_step_beyond_the_epoch_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="step 7: it has 6 steps"):
        train_loader().epoch(0, 7)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("channels_last", [False, True])
def test_cuda_serves_the_same_bits_without_synchronising(channels_last: bool) -> None:
    on_cpu = list(train_loader(drop_last=False, channels_last=channels_last).epoch(1))
    gpu = train_loader(drop_last=False, channels_last=channels_last, device=torch.device("cuda"))
    torch.cuda.set_sync_debug_mode("error")
    try:
        on_gpu = list(gpu.epoch(1))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    moved = [ViewBatch(b.views_VBCHW.cpu(), b.labels_B.cpu(), b.sample_ids_B.cpu()) for b in on_gpu]
    assert_equal(moved, on_cpu)
