"""Views made on a CUDA device against those made on the CPU, eagerly and in a captured graph."""

import pytest
import torch

from pipelines.augment import make_views, random_boxes
from pipelines.boxes import Boxes, centre_boxes, draw_boxes
from pipelines.colours import ColourRule, draw_colours
from pipelines.normalisation import NORMALISATIONS
from pipelines.view_spec import ViewSpec
from tests.pipelines.pictures import noise, padded, sizes_of

pytestmark = pytest.mark.gpu
SHAPES = [(375, 500), (500, 333), (1, 1), (79, 79), (500, 3), (240, 320)]
IMAGES = [noise(*shape, 3, seed=number) for number, shape in enumerate(SHAPES)]
BATCH = padded(IMAGES)
SIZES, SAMPLES = sizes_of(IMAGES), torch.tensor([5, 0, 2**31 - 1, 17, 4, 1_281_166])
JITTER = ColourRule(brightness=0.4, contrast=0.4, saturation=0.4, grayscale=0.3)
LAYOUTS = [
    {"channels": 3},
    {"channels": 4},
    {"channels": 8, "dtype": torch.bfloat16},
    {"channels_last": False, "dtype": torch.bfloat16},
]


def on_cuda(boxes: Boxes[torch.Tensor]) -> Boxes[torch.Tensor]:
    grids = None if boxes.grids_VB4 is None else boxes.grids_VB4.cuda()
    return Boxes(boxes.boxes_VB4.cuda(), boxes.flip_VB.cuda(), grids)


def check_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    found = found.cpu()
    if found.dtype == torch.float32:
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
        return
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=1e-4)
    assert (found != expected).double().mean() < 0.02  # sums in another order, rounded the other way


def test_boxes_and_colours_are_the_same_bits() -> None:
    sizes = torch.randint(1, 700, (100_000, 2))
    samples = torch.randint(0, 2**31, (100_000,))
    expected = draw_boxes(sizes, samples, 3, 2**32 - 1, 299)
    for found in (
        random_boxes(sizes.cuda(), samples.cuda(), 3, 2**32 - 1, 299),
        random_boxes(sizes.cuda(), samples.cuda(), 3, 2**32 - 1, torch.tensor(299, device="cuda")),
        draw_boxes(sizes.cuda(), samples.cuda(), 3, 2**32 - 1, 299),
    ):
        assert torch.equal(found.boxes_VB4.cpu(), expected.boxes_VB4)
        assert torch.equal(found.flip_VB.cpu(), expected.flip_VB)
    colours = draw_colours(samples.cuda(), 3, 1, 2, JITTER)
    assert torch.equal(colours.cpu(), draw_colours(samples, 3, 1, 2, JITTER))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("jitter", [False, True])
def test_views_are_those_of_the_cpu(layout: dict[str, object], jitter: bool) -> None:
    spec = ViewSpec(normalisation=NORMALISATIONS["imagenet"], **layout)  # type: ignore[arg-type]
    boxes = draw_boxes(SIZES, SAMPLES, 3, 0, 0)
    colours = draw_colours(SAMPLES, 3, 0, 0, JITTER) if jitter else None
    found = make_views(BATCH.cuda(), on_cuda(boxes), spec, None if colours is None else colours.cuda())
    check_close(found, make_views(BATCH, boxes, spec, colours))


def test_centre_crops_are_those_of_the_cpu() -> None:
    spec, boxes = ViewSpec(normalisation=NORMALISATIONS["imagenet"]), centre_boxes(SIZES, 224, 256)
    check_close(make_views(BATCH.cuda(), on_cuda(boxes), spec), make_views(BATCH, boxes, spec))


def test_a_captured_graph_replays_other_samples_and_epochs() -> None:
    spec = ViewSpec(normalisation=NORMALISATIONS["imagenet"], size=64)
    images, sizes, samples = BATCH.cuda(), SIZES.cuda(), SAMPLES.cuda()
    epoch = torch.zeros((), dtype=torch.int64, device="cuda")

    def make() -> torch.Tensor:
        return make_views(images, random_boxes(sizes, samples, 2, 0, epoch), spec)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        make()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        views = make()
    for number in (1, 2):
        samples.copy_(SAMPLES // number)
        epoch.fill_(number)
        graph.replay()
        boxes = draw_boxes(SIZES, SAMPLES // number, 2, 0, number)
        check_close(views, make_views(BATCH, boxes, spec))
