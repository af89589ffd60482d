"""The CIFAR views against torchvision on PIL images, and the distribution of what is drawn."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as tv
from torchvision.transforms.v2 import functional as tv2

from pcl_fast.philox import Stream, philox_numpy
from pipelines.cifar_views import CropTable, Normaliser, cifar_views, draw_crops
from pipelines.normalisation import NORMALISATIONS, Normalisation

CPU = torch.device("cpu")
CIFAR100 = NORMALISATIONS["cifar100"]
layouts = pytest.mark.parametrize("channels_last", [False, True], ids=["planar", "channels_last"])


def random_images(count: int, height: int = 32, width: int = 32) -> Tensor:
    shape = (count, 3, height, width)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def views_of(
    images: Tensor, sample_ids: Tensor, channels_last: bool, seed: int = 5, epoch: int = 2
) -> Tensor:
    table = CropTable(images, CPU, channels_last)
    normalise = Normaliser(CIFAR100, (images.shape[2], images.shape[3]), CPU, channels_last)
    return cifar_views(table, normalise, sample_ids, 3, seed, epoch)


def view_by_torchvision(image: Tensor, top: int, left: int, flip: bool) -> Tensor:
    height, width = image.shape[1:]
    picture: Any = Image.fromarray(image.permute(1, 2, 0).numpy())
    picture = tv.crop(tv.pad(picture, [4]), top, left, height, width)
    picture = tv.hflip(picture) if flip else picture
    return tv.normalize(tv.to_tensor(picture), list(CIFAR100.mean), list(CIFAR100.std))


@layouts
@pytest.mark.parametrize("size", [(32, 32), (6, 10)], ids=str)
def test_views_are_those_of_torchvision_bitwise(channels_last: bool, size: tuple[int, int]) -> None:
    images, sample_ids = random_images(60, *size), torch.tensor([59, 0, 17, 3, 17, 58, 1] * 4)
    views_VBCHW = views_of(images, sample_ids, channels_last)
    crops = draw_crops(sample_ids, 3, 5, 2)
    assert crops.flip_VB.any()
    assert not crops.flip_VB.all()
    for view in range(3):
        for place, sample in enumerate(sample_ids.tolist()):
            top, left = int(crops.top_VB[view, place]), int(crops.left_VB[view, place])
            expected = view_by_torchvision(images[sample], top, left, bool(crops.flip_VB[view, place]))
            assert torch.equal(views_VBCHW[view, place], expected)


@layouts
def test_every_crop_of_the_first_and_last_image(channels_last: bool) -> None:
    images = random_images(3)
    table = CropTable(images, CPU, channels_last)
    crops = draw_crops(torch.zeros(162, dtype=torch.int64), 1, 0, 0)
    corners = torch.cartesian_prod(torch.arange(9), torch.arange(9)).repeat(2, 1)
    crops.top_VB.copy_(corners[:, 0])
    crops.left_VB.copy_(corners[:, 1])
    crops.flip_VB.copy_(torch.arange(162) >= 81)
    for sample in (0, 2):
        pixels = table.read(table.locate(torch.full((162,), sample), crops))
        padded = torch.nn.functional.pad(images[sample], (4, 4, 4, 4))
        for number, (top, left) in enumerate(corners.tolist()):
            crop = padded[:, top : top + 32, left : left + 32]
            assert torch.equal(pixels[number], crop.flip(2) if number >= 81 else crop)


def test_version_two_of_torchvision_agrees_up_to_rounding() -> None:
    images = random_images(8)
    views = views_of(images, torch.arange(8), channels_last=True)
    crops = draw_crops(torch.arange(8), 3, 5, 2)
    for sample in range(8):
        padded = tv2.pad(images[sample], [4])
        crop = tv2.crop(padded, int(crops.top_VB[1, sample]), int(crops.left_VB[1, sample]), 32, 32)
        crop = tv2.horizontal_flip(crop) if crops.flip_VB[1, sample] else crop
        scaled = tv2.to_dtype(crop, torch.float32, scale=True)
        expected = tv2.normalize(scaled, list(CIFAR100.mean), list(CIFAR100.std))
        torch.testing.assert_close(views[1, sample], expected, rtol=0, atol=1e-6)


@layouts
def test_the_flattened_views_are_dense_in_their_layout(channels_last: bool) -> None:
    views = views_of(random_images(10), torch.arange(10), channels_last)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert views.shape == (3, 10, 3, 32, 32)
    assert views.dtype == torch.float32
    assert views.flatten(0, 1).is_contiguous(memory_format=layout)
    assert views.flatten(0, 1).data_ptr() == views.data_ptr()
    assert views[2].is_contiguous(memory_format=layout)


@layouts
def test_a_view_does_not_depend_on_its_batch(channels_last: bool) -> None:
    images = random_images(20)
    together = views_of(images, torch.arange(20), channels_last)
    shuffled = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    assert torch.equal(views_of(images, shuffled, channels_last), together[:, shuffled])
    assert torch.equal(views_of(images, torch.tensor([13]), channels_last), together[:, 13:14])


def test_what_is_drawn_is_what_philox_says() -> None:
    crops = draw_crops(torch.tensor([40_000, 7]), 3, seed=12, epoch=250)
    for view in range(3):
        for place, sample in enumerate((40_000, 7)):
            w0, w1, w2, _ = (int(w) for w in philox_numpy((12, Stream.AUGMENT), 250, sample, view, 0))
            drawn = [int(t[view, place]) for t in (crops.top_VB, crops.left_VB, crops.flip_VB)]
            assert drawn == [9 * w0 // 2**32, 9 * w1 // 2**32, int(w2 < 2**31)]


def test_the_epoch_may_be_a_tensor() -> None:
    number, tensor = (draw_crops(torch.arange(50), 2, 1, epoch) for epoch in (6, torch.tensor(6)))
    assert torch.equal(number.top_VB, tensor.top_VB)
    assert torch.equal(number.flip_VB, tensor.flip_VB)


def test_offsets_and_flips_are_uniform_and_independent() -> None:
    draws = [draw_crops(torch.arange(18_000), 3, 0, epoch) for epoch in range(3)]
    cells = torch.cat([(d.flip_VB * 81 + d.top_VB * 9 + d.left_VB).flatten() for d in draws])
    counts = cells.bincount(minlength=162).double()
    expected = 3 * 3 * 18_000 / 162
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert abs(chi_square - 161) < 5 * math.sqrt(2 * 161)  # 161 degrees of freedom
    offsets = counts.view(2, 81).sum(0)
    assert abs(float(((offsets - 2000) ** 2 / 2000).sum()) - 80) < 5 * math.sqrt(2 * 80)
    flips = float(counts[81:].sum() / counts.sum())
    assert abs(flips - 0.5) < 5 * 0.5 / math.sqrt(162_000)


def test_views_and_epochs_and_seeds_differ() -> None:
    def cells(seed: int, epoch: int) -> Tensor:
        crops = draw_crops(torch.arange(4000), 2, seed, epoch)
        return crops.flip_VB * 81 + crops.top_VB * 9 + crops.left_VB

    first = cells(0, 0)
    pairs = [(first[0], first[1]), (first[0], cells(0, 1)[0]), (first[0], cells(1, 0)[0])]
    pairs.append((first[0, 1:], first[0, :-1]))
    for one, other in pairs:
        agreement = float((one == other).double().mean())
        assert abs(agreement - 1 / 162) < 5 * math.sqrt(1 / 162 / 4000)


@layouts
def test_normaliser_is_the_formula(channels_last: bool) -> None:
    normalisation = Normalisation((0.1, 0.5, 0.7), (0.2, 0.3, 0.4))
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    images = Normaliser(normalisation, (16, 16), CPU, channels_last)(levels)
    mean, std = (np.array(v)[:, None, None] for v in (normalisation.mean, normalisation.std))
    np.testing.assert_allclose(images[1].numpy(), (levels[1].numpy() / 255 - mean) / std, rtol=0, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@layouts
def test_a_captured_graph_replays_other_samples_and_epochs(channels_last: bool) -> None:
    images, gpu = random_images(50), torch.device("cuda")
    table = CropTable(images, gpu, channels_last)
    normalise = Normaliser(CIFAR100, (32, 32), gpu, channels_last)
    sample_ids, epoch = torch.arange(20, device=gpu), torch.zeros((), dtype=torch.int64, device=gpu)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        cifar_views(table, normalise, sample_ids, 3, 5, epoch)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        views = cifar_views(table, normalise, sample_ids, 3, 5, epoch)
    for number in (1, 2):
        sample_ids.copy_(torch.arange(20) + 10 * number)
        epoch.fill_(number)
        graph.replay()
        expected = views_of(images, torch.arange(20) + 10 * number, channels_last, 5, number)
        assert torch.equal(views.cpu(), expected)
