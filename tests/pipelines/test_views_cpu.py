"""The C++ views against plain torch in float64, in every layout, from every thread."""

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipelines.boxes import Boxes, centre_boxes, draw_boxes
from pipelines.colours import ColourRule, apply_colours, draw_colours
from pipelines.resample import resample
from pipelines.view_spec import ViewSpec
from pipelines.views_cpu import Job, image_function, make_views_cpu, why_unavailable
from tests.pipelines.pictures import boxes_of, noise, padded, photos, plain, sizes_of

pytestmark = pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))
REPOSITORY = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
SMALL = [(60, 70), (1, 1), (59, 3), (2, 90), (300, 411), (24, 24)]
LAYOUTS: list[dict[str, Any]] = [
    {},
    {"channels": 4},
    {"channels": 8},
    {"channels_last": False},
]
JITTER = ColourRule(brightness=0.4, contrast=0.4, saturation=0.4, grayscale=0.3)


def views_of(
    images: Tensor, boxes: Boxes[Tensor], spec: ViewSpec, colours: Tensor | None = None, threads: int = 1
) -> Tensor:
    views, batch = boxes.flip_VB.shape
    out = spec.empty(views, batch, CPU).fill_(float("nan"))
    make_views_cpu(images, Job(boxes, spec, out, colours), threads)
    return out


def small_batch() -> tuple[Tensor, Boxes[Tensor]]:
    images = [noise(*shape, 3, seed=number) for number, shape in enumerate(SMALL)]
    return padded(images), draw_boxes(sizes_of(images), torch.arange(len(images)), 3, 0, 0)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("size", [1, 17, 64, 130])
def test_they_are_plain_torchs(size: int, layout: dict[str, Any]) -> None:
    images, boxes = small_batch()
    found = views_of(images, boxes, plain(size, **layout))
    expected = resample(images, boxes, size, torch.float64)
    assert (found[:, :, :3] - expected).abs().max() < 1e-3
    assert not found[:, :, 3:].any()


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_bfloat16_is_float32_rounded(layout: dict[str, Any]) -> None:
    images, boxes = small_batch()
    exact, rounded = (
        views_of(images, boxes, plain(33, dtype=t, **layout)) for t in (torch.float32, torch.bfloat16)
    )
    assert torch.equal(exact.to(torch.bfloat16), rounded)


@pytest.mark.parametrize(
    "box", [(5, 6, 1, 1), (0, 0, 1, 200), (0, 0, 200, 1), (0, 0, 200, 200), (80, 90, 11, 12)]
)
@pytest.mark.parametrize("flip", [False, True])
def test_boxes_that_are_made_much_larger_or_smaller(box: tuple[int, int, int, int], flip: bool) -> None:
    images, boxes = noise(1, 200, 200, 3), boxes_of(box, flip=flip)
    for size in (1, 2, 5, 30, 97):
        found = views_of(images, boxes, plain(size))
        assert (found - resample(images, boxes, size, torch.float64)).abs().max() < 1e-3


def test_centre_crops() -> None:
    images = [noise(*shape, 3, seed=number) for number, shape in enumerate(SMALL)]
    boxes = centre_boxes(sizes_of(images), 60, 72)
    found = views_of(padded(images), boxes, plain(60))
    assert (found - resample(padded(images), boxes, 60, torch.float64)).abs().max() < 1e-3


def test_photos(shared_data: Path) -> None:
    images = photos(shared_data, 80)
    for boxes in (
        draw_boxes(sizes_of(images), torch.arange(len(images)), 3, 0, 0),
        centre_boxes(sizes_of(images), 224, 256),
    ):
        found = views_of(padded(images), boxes, plain(224), threads=2)
        assert (found - resample(padded(images), boxes, 224, torch.float64)).abs().max() < 1e-3


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_jitter(layout: dict[str, Any]) -> None:
    images, boxes = small_batch()
    colours = draw_colours(torch.arange(len(SMALL)), 3, 0, 0, JITTER)
    found = views_of(images, boxes, plain(33, **layout), colours)
    expected = apply_colours(resample(images, boxes, 33, torch.float64), colours)
    assert (found[:, :, :3] - expected).abs().max() < 1e-3
    assert not found[:, :, 3:].any()


def test_the_number_of_threads_changes_nothing() -> None:
    images, boxes = small_batch()
    colours = draw_colours(torch.arange(len(SMALL)), 3, 0, 0, JITTER)
    one = views_of(images, boxes, plain(65), colours)
    for threads in (2, 3, 8):
        assert torch.equal(views_of(images, boxes, plain(65), colours, threads), one)


def test_images_one_by_one_from_many_threads_are_those_of_the_batch() -> None:
    images, boxes = small_batch()
    spec = plain(65)
    out = spec.empty(3, len(SMALL), CPU)
    job, function = Job(boxes, spec, out), image_function()

    def make(indices: range) -> None:
        for index in indices:
            function(job.address, images[index].data_ptr(), images.stride(1), index)

    threads = [threading.Thread(target=make, args=(range(start, len(SMALL), 3),)) for start in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(out, views_of(images, boxes, spec))


def test_numba_may_call_it_without_the_interpreters_lock() -> None:
    numba = pytest.importorskip("numba", reason="numba is not installed")
    function = image_function()

    @numba.njit(nogil=True)
    def make_all(job: int, pixels: int, stride: int, image_stride: int, count: int) -> None:
        for index in range(count):
            function(job, pixels + index * image_stride, stride, index)

    images, boxes = small_batch()
    spec = plain(17)
    out = spec.empty(3, len(SMALL), CPU)
    job = Job(boxes, spec, out)
    make_all(job.address, images.data_ptr(), images.stride(1), images.stride(0), len(images))
    assert torch.equal(out, views_of(images, boxes, spec))


@pytest.mark.parametrize(
    "box", [(0, 0, 31, 5), (-1, 0, 5, 5), (0, 26, 5, 5), (0, 0, 0, 5), (3, 3, 5, -1)], ids=str
)
def test_boxes_beyond_the_images_are_refused(box: tuple[int, int, int, int]) -> None:
    with pytest.raises(AssertionError, match="boxes beyond images"):
        views_of(noise(1, 30, 30, 3), boxes_of(box), plain(8))


def test_an_image_may_be_a_part_of_another() -> None:
    images = noise(2, 80, 90, 3)
    part, boxes = images[:, 10:60, 20:75], boxes_of((3, 4, 40, 50), (0, 0, 50, 55))
    assert torch.equal(views_of(part, boxes, plain(32)), views_of(part.contiguous(), boxes, plain(32)))


GUARDED = """
import ctypes, mmap, sys, torch
from tests.pipelines.pictures import boxes_of, noise, plain
from tests.pipelines.test_views_cpu import views_of

page = mmap.PAGESIZE
area = mmap.mmap(-1, 34 * page)
start = ctypes.addressof(ctypes.c_char.from_buffer(area))
libc = ctypes.CDLL(None, use_errno=True)
for guard in (0, 33):
    assert libc.mprotect(ctypes.c_void_p(start + guard * page), page, 0) == 0
for height, width in ((1, 1), (7, 5), (60, 70), (3, 1000)):
    image, size = noise(1, height, width, 3), height * width * 3
    for at in (page, 33 * page - size):  # right after, and right before, what must not be touched
        guarded = torch.frombuffer(area, dtype=torch.uint8, count=size, offset=at).view(1, height, width, 3)
        guarded.copy_(image)
        for box in ((0, 0, height, width), (height - 1, width - 1, 1, 1), (0, 0, 1, width)):
            for side in (1, 16, 50):
                found = views_of(guarded, boxes_of(box), plain(side))
                assert torch.equal(found, views_of(image, boxes_of(box), plain(side)))
print("untouched")
"""


def test_nothing_beyond_an_image_is_read() -> None:
    run = subprocess.run(
        [sys.executable, "-c", GUARDED], cwd=REPOSITORY, capture_output=True, text=True, timeout=50
    )
    assert run.stdout == "untouched\n", run.stderr


def test_nothing_beyond_the_views_is_written() -> None:
    images, boxes = small_batch()
    for layout in LAYOUTS:
        for dtype in (torch.float32, torch.bfloat16):
            spec = plain(33, dtype=dtype, **layout)
            length = spec.empty(3, len(SMALL), CPU).numel()
            memory = torch.full((length + 128,), 7.0, dtype=dtype)
            shape = spec.empty(3, len(SMALL), CPU)
            out = memory.as_strided(shape.shape, shape.stride(), 64)
            make_views_cpu(images, Job(boxes, spec, out), 2)
            assert (memory[:64] == 7).all()
            assert (memory[-64:] == 7).all()
            assert torch.equal(out, views_of(images, boxes, spec))
