"""How fast views are made on a GPU: CIFAR's from its data set in memory, ImageNet's from decoded images."""

from functools import partial

import torch
from torch import Tensor

from pcl_fast.config import Config
from pcl_fast.profile.gpu.bench import Bench, Row
from pcl_fast.profile.gpu.steps import step_config
from pipelines.boxes import IMAGENET_CROPS
from pipelines.normalisation import NORMALISATIONS
from pipelines.resident import ResidentTrainLoader, TrainOptions
from pipelines.view_spec import ViewSpec

CIFAR_IMAGES, CIFAR_SIZE = 50_000, 32
TINY_IMAGES = 64
LEAST_SIDE, MOST_SIDE = 300, 500  # of ImageNet's images, once their longer side has at most 500 pixels
LAUNCHES = 10
BATCHES = 50  # taken in a graph


def open_random(tiny: bool, config: Config, num_views: int) -> ResidentTrainLoader:
    """Random images of CIFAR's kind, held on the device, to train a resolved configuration on."""
    images, classes = TINY_IMAGES if tiny else CIFAR_IMAGES, config.data.classes
    draws = torch.Generator().manual_seed(0)
    shape = (images, 3, CIFAR_SIZE, CIFAR_SIZE)
    options = TrainOptions(
        batch_size=config.train.batch_size,
        num_classes=classes,
        normalisation=NORMALISATIONS[config.data.dataset],
        device=torch.device(config.device),
        channels_last=config.channels_last == "on",
        num_views=num_views,
        seed=config.seed,
        drop_last=True,
        dtype=torch.bfloat16 if config.amp.dtype == "bfloat16" else torch.float32,
    )
    images_NCHW = torch.randint(256, shape, generator=draws, dtype=torch.uint8)
    return ResidentTrainLoader(images_NCHW, torch.randint(classes, (images,), generator=draws), options)


def measure_views(bench: Bench) -> None:
    """Batches of CIFAR; boxes and views of ImageNet."""
    for batch in bench.pick((128, 512), (4,)):
        about = {"what": "views", "batch": batch, "views": 3}
        bench.attempt({**about, "name": "CIFAR, resident"}, partial(_cifar, bench, batch))
    bench.attempt(
        {"what": "views", "batch": CIFAR_IMAGES, "views": 3, "name": "CIFAR, an epoch laid out"},
        partial(_epoch, bench),
    )
    for batch, views in bench.pick(((64, 3), (256, 1), (256, 3)), ((2, 2),)):
        about = {"what": "views", "batch": batch, "views": views}
        bench.attempt({**about, "name": "ImageNet, boxes drawn"}, partial(_boxes, bench, batch, views))
        bench.attempt({**about, "name": "ImageNet, 224 x 224"}, partial(_imagenet, bench, batch, views))


def _cifar(bench: Bench, batch: int) -> Row:
    loader = open_random(bench.tiny, step_config(bench, ("resnet32", batch)), 3)
    loader.begin(0)
    views = loader.take().views_VBCHW
    rewind = partial(loader.begin, 0)
    batches = min(BATCHES, loader.steps_per_epoch // 2)

    def take() -> None:
        loader.take()

    # The place in the epoch is kept on the device: a replay too many would read beyond its end.
    replay = bench.graph([take] * batches)
    seconds: list[float] = []
    for _ in range(bench.samples):
        rewind()
        seconds.append(bench.time_calls(replay, 1) / batches)
    return {"seconds": seconds, "bytes": views.numel() * (1 + views.element_size())}


def _epoch(bench: Bench) -> Row:
    loader = open_random(bench.tiny, step_config(bench, ("resnet32", 4 if bench.tiny else 128)), 3)
    loader.begin(0)
    return {"seconds": bench.time(partial(loader.begin, 0))}


def _boxes(bench: Bench, batch: int, views: int) -> Row:
    from pipelines.boxes_triton import draw_boxes_triton

    sizes_B2, ids_B = _sizes(bench, batch)
    draw = partial(draw_boxes_triton, sizes_B2, ids_B, views, 0, 0, IMAGENET_CROPS)
    return {"seconds": bench.time_graph([draw], 1 if bench.tiny else LAUNCHES)}


def _imagenet(bench: Bench, batch: int, views: int) -> Row:
    from pipelines.boxes_triton import draw_boxes_triton
    from pipelines.views_triton import make_views_triton

    sizes_B2, ids_B = _sizes(bench, batch)
    boxes = draw_boxes_triton(sizes_B2, ids_B, views, 0, 0, IMAGENET_CROPS)
    side = int(sizes_B2.max())
    images_BHWC = torch.randint(256, (batch, side, side, 3), device=bench.device, dtype=torch.uint8)
    size = 16 if bench.tiny else 224
    spec = ViewSpec(normalisation=NORMALISATIONS["imagenet"], size=size, dtype=torch.bfloat16)
    out = spec.empty(views, batch, bench.device)
    make = partial(make_views_triton, images_BHWC, boxes, spec, out)
    seconds = bench.time_graph([make], 1 if bench.tiny else LAUNCHES)
    read = 3 * int(boxes.boxes_VB4[..., 2:].prod(-1).sum())
    return {"seconds": seconds, "bytes": read + 2 * out.numel()}


def _sizes(bench: Bench, batch: int) -> tuple[Tensor, Tensor]:
    """Heights and widths of images, and their numbers."""
    draws = torch.Generator().manual_seed(0)
    bounds = (16, 33) if bench.tiny else (LEAST_SIDE, MOST_SIDE + 1)
    sizes_B2 = torch.randint(*bounds, (batch, 2), generator=draws)
    return sizes_B2.to(bench.device), torch.arange(batch, device=bench.device)
