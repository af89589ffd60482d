"""The Triton views against plain torch: interpreted here, compiled for a GPU that need not be there."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipelines.boxes import Boxes, centre_boxes, draw_boxes
from pipelines.colours import ColourRule, draw_colours
from pipelines.normalisation import NORMALISATIONS
from pipelines.resample import reference_views
from pipelines.view_spec import ViewSpec
from tests.gpu_compiler import assert_compiles
from tests.pipelines.pictures import boxes_of, noise, padded, plain, sizes_of

pytest.importorskip("triton", reason="triton is not installed")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SMALL = [(30, 45), (1, 1), (59, 3)]


def views_of(images: Tensor, boxes: Boxes[Tensor], spec: ViewSpec, colours: Tensor | None = None) -> Tensor:
    from pipelines.views_triton import make_views_triton

    views, batch = boxes.flip_VB.shape
    out = spec.empty(views, batch, DEVICE).fill_(float("nan"))
    grids = None if boxes.grids_VB4 is None else boxes.grids_VB4.to(DEVICE)
    moved = Boxes(boxes.boxes_VB4.to(DEVICE), boxes.flip_VB.to(DEVICE), grids)
    make_views_triton(images.to(DEVICE), moved, spec, out, None if colours is None else colours.to(DEVICE))
    return out.cpu()


def small_batch(views: int = 2) -> tuple[Tensor, Boxes[Tensor]]:
    images = [noise(*shape, 3, seed=number) for number, shape in enumerate(SMALL)]
    return padded(images), draw_boxes(sizes_of(images), torch.arange(len(images)), views, 3, 0)


@pytest.mark.parametrize("layout", [{}, {"channels": 4}, {"channels": 8}, {"channels_last": False}], ids=str)
def test_they_are_plain_torchs(layout: dict[str, Any]) -> None:
    images, boxes = small_batch()
    spec = plain(20, **layout)
    found = views_of(images, boxes, spec)
    assert (found - reference_views(images, boxes, spec)).abs().max() < 1e-3


def test_tiles_cover_a_view_larger_than_one() -> None:
    images, boxes = noise(1, 21, 22, 3), boxes_of((1, 2, 20, 20), flip=True)
    spec = plain(35)
    assert (views_of(images, boxes, spec) - reference_views(images, boxes, spec)).abs().max() < 1e-3


def test_boxes_that_are_made_much_smaller() -> None:
    images, boxes = noise(1, 60, 50, 3), boxes_of((0, 0, 60, 50))
    spec = plain(6)
    assert (views_of(images, boxes, spec) - reference_views(images, boxes, spec)).abs().max() < 1e-3


def test_centre_crops() -> None:
    images = [noise(*shape, 3, seed=number) for number, shape in enumerate(SMALL)]
    boxes = centre_boxes(sizes_of(images), 14, 16)
    spec = plain(14)
    found = views_of(padded(images), boxes, spec)
    assert (found - reference_views(padded(images), boxes, spec)).abs().max() < 1e-3


def test_bfloat16_normalised_and_padded() -> None:
    images, boxes = small_batch(views=1)
    normalisation = NORMALISATIONS["imagenet"]
    spec = ViewSpec(normalisation=normalisation, size=16, dtype=torch.bfloat16, channels=8)
    found, expected = views_of(images, boxes, spec), reference_views(images, boxes, spec)
    # The interpreter truncates to bfloat16 where a GPU rounds.
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=1e-5)
    assert not found[:, :, 3:].any()


def test_jitter_over_several_tiles() -> None:
    image = noise(1, 24, 30, 3)
    images, spec = image.expand(7, -1, -1, -1).contiguous(), plain(18)
    boxes = boxes_of(*[(2, 3, 20, 25)] * 7)
    colours = draw_colours(torch.arange(7), 1, 0, 0, ColourRule(brightness=0.4, contrast=0.4, saturation=0.4))
    colours[0, :6, 3] = torch.arange(6)  # every order
    colours[0, 6, 4] = 1  # and gray
    found = views_of(images, boxes, spec, colours)
    assert (found - reference_views(images, boxes, spec, colours)).abs().max() < 1e-3


COMPILED = """
import re, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from pipelines.boxes_triton import _draw
from pipelines.views_triton import _make_tile

def compiled(kernel, types, constants, fusion):
    names = kernel.arg_names
    places = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, {name: types.get(name, "constexpr") for name in names}, places)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": fusion})
    assert made.asm["cubin"]
    return made.asm["ptx"]

whole = "count batch least share_span low log_span narrowest widest inverse".split()
types = dict.fromkeys(whole, "i32") | dict.fromkeys("sizes sample_ids epoch boxes".split(), "*i64")
ptx = compiled(_draw, types | {"flips": "*u8", "key": "i64"}, {"BLOCK": 128}, False)
used = set(re.findall(r"\\b\\w+(?:\\.\\w+)*\\.f64\\b", ptx))
assert "sqrt.rn.f64" in used, used
assert not [name for name in used if name.startswith(("fma", "mad", "div")) or "approx" in name], used

sizes = "views batch image_stride row_stride out_image out_channel out_row out_column".split()
numbers = [f"{c}_{n}" for c in ("red", "green", "blue") for n in ("scale", "shift")]
types = dict.fromkeys(sizes, "i32") | dict.fromkeys(numbers, "fp32")
types |= {"pixels": "*u8", "boxes": "*i64", "flips": "*u8"}
tiles = {"SIZE": 224, "CHANNELS": 8, "TILES": 98, "ALL_TILES": 128, "ROWS": 16, "COLUMNS": 32}
jitter, no_jitter = {"colours": "*fp32", "sums": "*fp32"}, {"colours": None, "sums": None}
plain = tiles | no_jitter | {"ONLY_SUMS": False}
compiled(_make_tile, types | {"out": "*bf16"}, plain | {"grids": None}, True)
compiled(_make_tile, types | {"out": "*fp32", "grids": "*i64"}, plain, True)
for only_sums in (True, False):
    constants = tiles | {"grids": None, "ONLY_SUMS": only_sums}
    compiled(_make_tile, types | jitter | {"out": "*bf16"}, constants, True)
print("compiled")
"""


def test_they_compile_for_a_gpu_and_boxes_use_correctly_rounded_operations_only(tmp_path: Path) -> None:
    assert_compiles(COMPILED, tmp_path)
