"""Every path from an image to its views against PIL, and the loaders against each other."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pcl_fast.contract import ViewBatch
from pipelines.normalisation import NORMALISATIONS
from pipelines.options import ImageEvalOptions, ImageTrainOptions
from tests.datasets_prep.pictures import ImageOptions, convert_folder, encoded, picture
from tests.pipelines.parity import (
    DEVICE,
    EPOCH,
    OURS,
    Comparison,
    Difference,
    Row,
    broken_limits,
    in_gray_levels,
    kernels,
    pixels_by_pil,
    show,
    views_by_kernel,
)
from tests.pipelines.parity_loaders import LOADER_PATHS, MISSING, OTHER_WAYS, TORCHS, views_by_loader

SHAPES = [(1, 1), (1, 90), (1, 700), (500, 1), (2, 70), (33, 47), (24, 24), (97, 31), (60, 200), (150, 120)]
PHOTOS, MOST_PIXELS, CORNER = 16, 1 << 20, 64
SMALL_VIEWS = (32, 40)  # and what the shorter side is resized to for evaluation
ROUNDING = 1e-3
RESULT = "PARITY_JSON"
COMMON: dict[str, Any] = {
    "batch_size": 8,
    "num_classes": 1,
    "normalisation": NORMALISATIONS["imagenet"],
    "device": torch.device("cpu"),
    "channels_last": True,
    "workers": 2,
}


def options_of(size: int, resize: int) -> tuple[ImageTrainOptions, ImageEvalOptions]:
    common: dict[str, Any] = {**COMMON, "image_size": size}
    return (
        ImageTrainOptions(num_views=2, seed=7, drop_last=False, **common),
        ImageEvalOptions(resize=resize, **common),
    )


RANKS = dataclasses.replace(options_of(*SMALL_VIEWS)[0], batch_size=12)


def generated(height: int, width: int) -> dict[str, Image.Image]:
    """Pictures of one size: noise is the worst case of a filter, a gradient that of rounding."""
    noise = np.random.default_rng(height * width).integers(0, 256, (height, width, 3), np.uint8)
    down, across = np.linspace(0, 255, height)[:, None], np.linspace(0, 255, width)[None]
    ramp = np.stack(np.broadcast_arrays(down, across, (down + across) / 2), -1)
    return {
        "noise": Image.fromarray(noise),
        "ramp": Image.fromarray(ramp.round().astype(np.uint8)),
        "gray": picture(height, width, height).convert("L"),
    }


@pytest.fixture(scope="module")
def generated_beton(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Generated pictures, the smallest of them as raw pixels."""
    folder = tmp_path_factory.mktemp("generated")
    (folder / "source" / "c0").mkdir(parents=True)
    for height, width in SHAPES:
        for name, image in generated(height, width).items():
            file = folder / "source" / "c0" / f"{height}x{width}-{name}.jpg"
            file.write_bytes(encoded(image, quality=95))
    image = ImageOptions(mode="smart", max_side=0, smart_threshold=24 * 24 * 3)
    convert_folder(folder / "source", folder / "generated.beton", image=image)
    return folder / "generated.beton"


@pytest.fixture(scope="module")
def photos_beton(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some photos as they are: every so many, all gray ones, and the smallest, the longest, the largest."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "source" / "c0").mkdir(parents=True)
    for number, path in enumerate(chosen_photos(shared_data)):
        (folder / "source" / "c0" / f"{number:03}.jpg").write_bytes(path.read_bytes())
    convert_folder(folder / "source", folder / "photos.beton", image=ImageOptions(max_side=0))
    return folder / "photos.beton"


def chosen_photos(shared_data: Path) -> list[Path]:
    sizes: dict[Path, tuple[int, int]] = {}
    gray: list[Path] = []
    for path in sorted((shared_data / "imagenet-mini").glob("*/*/*.JPEG")):
        with Image.open(path) as image:
            if image.width * image.height <= MOST_PIXELS:
                sizes[path] = image.size
                gray += [path] if image.mode == "L" else []
    by_area = sorted(sizes, key=lambda path: sizes[path][0] * sizes[path][1])
    by_ratio = sorted(sizes, key=lambda path: sizes[path][0] / sizes[path][1])
    odd = gray + by_area[:2] + by_area[-2:] + by_ratio[:2] + by_ratio[-2:]
    every = list(sizes)[:: len(sizes) // PHOTOS]
    return sorted({*every, *odd})


def kernel_rows(comparison: Comparison) -> list[Row]:
    """Triton's kernel is interpreted where there is no GPU, which takes its time: a few images do."""
    rows: list[Row] = []
    for name, make in kernels().items():
        used = few_of(comparison) if name == "Triton" and DEVICE.type == "cpu" else comparison
        rows.append(used.row(name, OURS, views_by_kernel(make, used.pixels, used.options)))
    return rows


def loader_rows(comparison: Comparison, beton: Path, patch: pytest.MonkeyPatch) -> list[Row]:
    rows: list[Row] = []
    for name, path in LOADER_PATHS.items():
        options, decoded = comparison.options, dict[int, torch.Tensor]()
        loader = path.open(beton, options)
        views = views_by_loader(loader, options)
        with patch.context() as watching:
            path.watch(watching, decoded)
            watched = views_by_loader(loader, options)
        assert decoded.keys() == watched.keys() == views.keys() == comparison.pixels.keys()
        assert all(torch.equal(views[sample], watched[sample]) for sample in views), "watching changes views"
        rows.append(comparison.row(name, path.limits, views, decoded))
    return rows


def write(pictures: str, rows: list[Row]) -> None:
    """Put the differences into the file that PARITY_JSON names, beside those of other pictures."""
    if not (name := os.environ.get(RESULT)):
        return
    file = Path(name)
    told = json.loads(file.read_text()) if file.exists() else {}
    told[pictures] = [dataclasses.asdict(row) for row in rows]
    file.write_text(json.dumps(told, indent=1) + "\n")


def few_of(comparison: Comparison) -> Comparison:
    """What an interpreted kernel has the time for: small views of some images, of photos the corners."""
    pictures, options = comparison.pictures, comparison.options
    train, evaluate = options_of(*SMALL_VIEWS)
    few = train if isinstance(options, ImageTrainOptions) else evaluate
    some = list(comparison.pixels)[::7]
    if pictures == "generated":
        return Comparison(pictures, {sample: comparison.pixels[sample] for sample in some}, few)
    corners = {sample: comparison.pixels[sample][:CORNER, :CORNER] for sample in some}
    return Comparison(f"{pictures}' corners", corners, few)


@pytest.mark.parametrize(("pictures", "sizes"), [("generated", SMALL_VIEWS), ("photos", (224, 256))], ids=str)
def test_views_are_pils(
    pictures: str, sizes: tuple[int, int], request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    beton: Path = request.getfixturevalue(f"{pictures}_beton")
    pixels, rows = pixels_by_pil(beton), list[Row]()
    for options in options_of(*sizes):
        comparison = Comparison(pictures, pixels, options)
        rows += kernel_rows(comparison)
        rows += loader_rows(comparison, beton, monkeypatch)
    show(rows)
    write(pictures, rows)
    assert broken_limits(rows) == []
    skip_if_some_are_missing()


def skip_if_some_are_missing() -> None:
    if MISSING:
        pytest.skip(f"the paths that are here were compared; for the others: {'; '.join(MISSING)}")


@pytest.fixture(scope="module")
def whole(generated_beton: Path) -> dict[str, list[ViewBatch]]:
    """An epoch by one rank, of every loader."""
    return {name: list(path.open(generated_beton, RANKS).epoch(EPOCH)) for name, path in LOADER_PATHS.items()}


def apart(some: list[ViewBatch], others: list[ViewBatch], rim: int = 0) -> float:
    """The greatest difference of views in gray levels, but for `rim` rows and columns on each side."""
    one, other = (
        dict(enumerate(in_gray_levels(batch.views_VBCHW, RANKS) for batch in batches))
        for batches in (some, others)
    )
    return Difference.of(one, other, rim).max


def test_loaders_hand_out_the_same(whole: dict[str, list[ViewBatch]]) -> None:
    """Ids and labels to the last; views as far apart as both are from PIL, ours to rounding."""
    known = whole[TORCHS]
    assert [len(batch.labels_B) for batch in known] == [12, 12, 6]
    assert sorted(torch.cat([batch.sample_ids_B for batch in known]).tolist()) == list(range(30))
    ours = [name for name, path in LOADER_PATHS.items() if path.limits is OURS]
    for name, batches in whole.items():
        for batch, other in zip(batches, known, strict=True):
            assert torch.equal(batch.sample_ids_B, other.sample_ids_B), name
            assert torch.equal(batch.labels_B, other.labels_B), name
        limits, theirs = LOADER_PATHS[name].limits, LOADER_PATHS[TORCHS].limits
        assert apart(batches, known) <= limits.resampling + theirs.resampling, name
        assert apart(batches, known, rim=1) <= limits.inside + theirs.inside, name
        if name in ours:
            assert apart(batches, whole[ours[0]]) <= ROUNDING, name
    skip_if_some_are_missing()


@pytest.mark.parametrize("name", [name for name in LOADER_PATHS if name not in OTHER_WAYS])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_that_resume_share_the_rest_of_the_epoch(
    generated_beton: Path, whole: dict[str, list[ViewBatch]], world_size: int, name: str
) -> None:
    ranks = [
        dataclasses.replace(
            RANKS, batch_size=RANKS.batch_size // world_size, world_size=world_size, rank=rank
        )
        for rank in range(world_size)
    ]
    resumed = [list(LOADER_PATHS[name].open(generated_beton, rank).epoch(EPOCH, 1)) for rank in ranks]
    for parts, batch in zip(zip(*resumed, strict=True), whole[name][1:], strict=True):
        assert torch.equal(torch.cat([part.views_VBCHW for part in parts], 1), batch.views_VBCHW)
        assert torch.equal(torch.cat([part.sample_ids_B for part in parts]), batch.sample_ids_B)
        assert torch.equal(torch.cat([part.labels_B for part in parts]), batch.labels_B)
