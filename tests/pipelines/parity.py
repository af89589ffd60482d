"""How far the views of each path are from PIL's, in gray levels, before normalisation.

Of every path three differences are taken: the pixels that its decoder hands on from PIL's; its views
from those that PIL makes of the same decoded pixels; its views from those that PIL makes from the file.
"""

import dataclasses
import io
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor

from pcl_fast.beton import RAW, open_beton
from pipelines.boxes import Boxes, centre_boxes, draw_boxes
from pipelines.options import ImageEvalOptions, ImageTrainOptions
from pipelines.resample import reference_views
from pipelines.view_spec import ViewSpec
from pipelines.views_cpu import Job, make_views_cpu, why_unavailable
from tests.pipelines.pictures import by_pil, centre_by_torchvision

EPOCH = 2
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Options = ImageTrainOptions | ImageEvalOptions
Pixels = dict[int, Tensor]  # of each sample: uint8 [H, W, 3]
Views = dict[int, Tensor]  # of each sample: float64 [V, 3, S, S], from 0 to 255
Kernel = Callable[[Tensor, Boxes[Tensor], ViewSpec], Tensor]


@dataclasses.dataclass(frozen=True)
class Limits:
    """How far a path may be from PIL, in gray levels.

    `resampling`: its views from PIL's of the same decoded pixels; `inside`: the same but for the outermost
    rows and columns; `decoder`: its pixels from PIL's.
    """

    resampling: float
    inside: float
    decoder: float = 0.0


# PIL rounds after each of its two passes; its coefficients have 22 bits, which moves what lies halfway.
OURS = Limits(1 + 1e-4, 1 + 1e-4)


@dataclasses.dataclass(frozen=True)
class Difference:
    """Mean and maximum of absolute differences, in gray levels of 255."""

    mean: float
    max: float

    @classmethod
    def of(cls, some: dict[int, Tensor], others: dict[int, Tensor], rim: int = 0) -> "Difference":
        """Over all values of all samples, but for `rim` rows and columns on each side."""
        assert some.keys() == others.keys()
        total, count, largest = 0.0, 0, 0.0
        for sample, one in some.items():
            apart = (one.double() - others[sample].double()).abs()
            if rim:
                apart = apart[..., rim:-rim, rim:-rim]
            total, count = total + float(apart.sum()), count + apart.numel()
            largest = max(largest, float(apart.max()))
        return cls(total / count, largest)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """The differences of one path to PIL; `decoder` is None of a kernel, which decodes nothing.

    `inside` is `resampling` but for the outermost rows and columns.
    """

    pictures: str
    views: str
    path: str
    images: int
    limits: Limits
    decoder: Difference | None
    resampling: Difference
    inside: Difference
    end_to_end: Difference


def pixels_by_pil(path: Path) -> Pixels:
    """Every sample of a .beton file."""
    found: Pixels = {}
    with open_beton(path) as file:
        for sample in range(file.num_samples):
            data, (height, width) = bytes(file.encoded(sample)), file.sizes_N2[sample].tolist()
            if file.modes_N[sample] == RAW:
                image = Image.frombytes("RGB", (width, height), data)
            else:
                image = Image.open(io.BytesIO(data)).convert("RGB")
            found[sample] = torch.from_numpy(np.array(image))
    return found


def boxes_of(image_HWC: Tensor, sample: int, options: Options) -> Boxes[Tensor]:
    """The views that a loader is to make of an image."""
    sizes_B2 = torch.tensor([image_HWC.shape[:2]])
    if isinstance(options, ImageEvalOptions):
        return centre_boxes(sizes_B2, options.image_size, options.resize)
    return draw_boxes(sizes_B2, torch.tensor([sample]), options.num_views, options.seed, EPOCH)


def views_by_pil(image_HWC: Tensor, sample: int, options: Options) -> Tensor:
    """Cropped, resized and flipped by PIL: `[V, 3, S, S]`."""
    size = options.image_size
    if isinstance(options, ImageEvalOptions):
        return centre_by_torchvision(image_HWC, size, options.resize).unsqueeze(0)
    boxes = boxes_of(image_HWC, sample, options)
    views = zip(boxes.boxes_VB4[:, 0].tolist(), boxes.flip_VB[:, 0].tolist(), strict=True)
    return torch.stack([by_pil(image_HWC, box, flip, size) for box, flip in views])


def in_gray_levels(views: Tensor, options: Options) -> Tensor:
    """Views `[..., 3, S, S]` without their normalisation, in float64."""
    mean, std = (
        torch.tensor(part, dtype=torch.float64).view(3, 1, 1)
        for part in (options.normalisation.mean, options.normalisation.std)
    )
    return (views.cpu().double() * std + mean) * 255


def views_by_kernel(make: Kernel, pixels: Pixels, options: Options) -> Views:
    """Image by image."""
    spec = ViewSpec(normalisation=options.normalisation, size=options.image_size)
    found: Views = {}
    for sample, image in pixels.items():
        views_V1CSS = make(image.unsqueeze(0), boxes_of(image, sample, options), spec)
        found[sample] = in_gray_levels(views_V1CSS[:, 0], options)
    return found


def by_triton(images_BHWC: Tensor, boxes: Boxes[Tensor], spec: ViewSpec) -> Tensor:
    """The kernel for GPUs; interpreted where there is none."""
    from pipelines.views_triton import make_views_triton

    views, batch = boxes.flip_VB.shape
    out = spec.empty(views, batch, DEVICE)
    grids = None if boxes.grids_VB4 is None else boxes.grids_VB4.to(DEVICE)
    moved = Boxes(boxes.boxes_VB4.to(DEVICE), boxes.flip_VB.to(DEVICE), grids)
    make_views_triton(images_BHWC.to(DEVICE), moved, spec, out)
    return out


def by_cpp(images_BHWC: Tensor, boxes: Boxes[Tensor], spec: ViewSpec) -> Tensor:
    """The kernel for CPUs."""
    views, batch = boxes.flip_VB.shape
    out = spec.empty(views, batch, torch.device("cpu"))
    make_views_cpu(images_BHWC, Job(boxes, spec, out), 1)
    return out


def kernels() -> dict[str, Kernel]:
    """Those that run here, and the plain version."""
    found: dict[str, Kernel] = {"plain torch": reference_views}
    if why_unavailable() is None:
        found["C++"] = by_cpp
    if find_spec("triton"):
        found["Triton"] = by_triton
    return found


class Comparison:
    """PIL's views of some images, from the pixels that it decodes or from others; each is made once."""

    def __init__(self, pictures: str, pixels: Pixels, options: Options) -> None:
        self.pictures, self.pixels, self.options = pictures, pixels, options
        self._by_pil: Views = {}

    def only(self, samples: Sequence[int]) -> "Comparison":
        """The same of some of the images."""
        return Comparison(self.pictures, {sample: self.pixels[sample] for sample in samples}, self.options)

    def expected(self, pixels: Pixels) -> Views:
        """PIL's views of these pixels."""
        found: Views = {}
        for sample, image in pixels.items():
            if torch.equal(image, self.pixels[sample]):
                if sample not in self._by_pil:
                    self._by_pil[sample] = views_by_pil(image, sample, self.options)
                found[sample] = self._by_pil[sample]
            else:
                found[sample] = views_by_pil(image, sample, self.options)
        return found

    def row(self, path: str, limits: Limits, views: Views, decoded: Pixels | None = None) -> Row:
        """How far a path's views are from PIL's; `decoded` are its pixels, if it decodes."""
        same_pixels, from_file = self.expected(decoded or self.pixels), self.expected(self.pixels)
        resampling = Difference.of(views, same_pixels)
        return Row(
            pictures=self.pictures,
            views=described(self.options),
            path=path,
            images=len(views),
            limits=limits,
            decoder=None if decoded is None else Difference.of(decoded, self.pixels),
            resampling=resampling,
            inside=Difference.of(views, same_pixels, rim=1),
            end_to_end=Difference.of(views, from_file),
        )


def described(options: Options) -> str:
    """The views, in words."""
    if isinstance(options, ImageEvalOptions):
        return f"resize {options.resize}, centre {options.image_size}"
    return f"{options.num_views} random crops, {options.image_size}"


def broken_limits(rows: Sequence[Row]) -> list[str]:
    """What is further from PIL than it may be."""
    broken: list[str] = []
    for row in rows:
        limits = row.limits
        found = {
            "decoder": (row.decoder.max if row.decoder else 0.0, limits.decoder),
            "resampling": (row.resampling.max, limits.resampling),
            "inside": (row.inside.max, limits.inside),
        }
        for part, (most, limit) in found.items():
            if not most <= limit:
                broken.append(f"{row.pictures}, {row.views}, {row.path}: {part} {most} > {limit}")
    return broken


def show(rows: Sequence[Row]) -> None:
    """Print the differences as a table."""
    table = Table(title="Differences from PIL in gray levels of 255: mean, maximum")
    for name in ("pictures", "views", "path"):
        table.add_column(name)
    for name in ("images", "decoder", "resampling", "but for the rim", "end to end"):
        table.add_column(name, justify="right")
    for row in rows:
        parts = (row.decoder, row.resampling, row.inside, row.end_to_end)
        told = ("-" if part is None else f"{part.mean:.4f} {part.max:7.4f}" for part in parts)
        table.add_row(row.pictures, row.views, row.path, str(row.images), *told)
    Console(width=150).print(table)
