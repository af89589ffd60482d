"""A resident batch in Triton against the plain way, to the bit: interpreted here, compiled for a GPU."""

from pathlib import Path

import pytest
import torch

from pcl_fast.contract import ViewBatch
from pipelines.normalisation import NORMALISATIONS
from pipelines.resident import ResidentTrainLoader, TrainOptions
from tests.gpu_compiler import assert_compiles

pytest.importorskip("triton", reason="triton is not installed")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def make_loader(height: int, width: int, views: int = 2, rank: int = 0, world_size: int = 1):
    draws = torch.Generator().manual_seed(4)
    images = torch.randint(0, 256, (14, 3, height, width), generator=draws, dtype=torch.uint8)
    options = TrainOptions(
        batch_size=3,
        num_classes=10,
        normalisation=NORMALISATIONS["cifar100"],
        device=DEVICE,
        channels_last=True,
        num_views=views,
        seed=7,
        drop_last=True,
        rank=rank,
        world_size=world_size,
    )
    return ResidentTrainLoader(images, torch.arange(14) % 10, options)


def taken_by_kernel(loader: ResidentTrainLoader, dtype: torch.dtype) -> ViewBatch:
    from pipelines.resident_triton import Place, take_triton

    laid, table = loader._laid, loader.table
    assert laid is not None
    place = Place(loader._step, loader.batch_size, (table.height, table.width), table.row)
    batch = ViewBatch(*take_triton(table.pixels, laid, place, loader.options.normalisation, dtype))
    loader._step += 1
    return batch


@pytest.mark.parametrize("size", [(32, 32), (5, 9), (1, 1)], ids=str)
@pytest.mark.parametrize("views", [1, 3])
def test_batches_of_an_epoch_are_those_of_plain_torch(size: tuple[int, int], views: int) -> None:
    loader = make_loader(*size, views=views)
    for epoch in (0, 3):
        loader.begin(epoch)
        for expected in loader.epoch(epoch):
            found = taken_by_kernel(loader, torch.float32)
            assert torch.equal(found.views_VBCHW, expected.views_VBCHW)
            assert found.views_VBCHW.stride() == expected.views_VBCHW.stride()
            assert torch.equal(found.labels_B, expected.labels_B)
            assert torch.equal(found.sample_ids_B, expected.sample_ids_B)


def test_ranks_share_the_batches_of_one() -> None:
    alone, ranks = make_loader(6, 6), [make_loader(6, 6, rank=rank, world_size=2) for rank in range(2)]
    for loader in (alone, *ranks):
        loader.begin(2)
    for _ in range(2):
        halves = [taken_by_kernel(alone, torch.float32) for _ in range(2)]
        for half, loader in zip(halves, ranks, strict=True):
            found = taken_by_kernel(loader, torch.float32)
            assert torch.equal(found.views_VBCHW, half.views_VBCHW)
            assert torch.equal(found.sample_ids_B, half.sample_ids_B)


def test_it_goes_on_at_the_step_begun_with() -> None:
    loader = make_loader(6, 6)
    loader.begin(1, 2)
    expected = list(loader.epoch(1))[2]
    assert torch.equal(taken_by_kernel(loader, torch.float32).views_VBCHW, expected.views_VBCHW)


def test_half_precision_is_the_same_rounded() -> None:
    """The interpreter cuts off where a GPU rounds to the nearest: either neighbour is right."""
    loader = make_loader(8, 8)
    loader.begin(0)
    exact = next(loader.epoch(0)).views_VBCHW
    found = taken_by_kernel(loader, torch.bfloat16).views_VBCHW
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), exact, rtol=2**-7, atol=0)


@pytest.mark.gpu
def test_the_loader_uses_it_on_a_gpu() -> None:
    loader = make_loader(32, 32)
    loader.begin(0)
    for expected in loader.epoch(0):
        assert torch.equal(loader.take().views_VBCHW, expected.views_VBCHW)


COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from pipelines.resident_triton import _take

longs = ("order", "starts", "labels", "step", "labels_out", "ids_out")
types = {"pixels": "*u8", "out": "*bf16"} | dict.fromkeys(longs, "*i64")
types |= {name: "fp32" for name in _take.arg_names if name[:3] in ("mea", "std")}
constants = {"LINE": 96, "LENGTH": 3072, "BLOCK": 1024}
names = _take.arg_names
signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
source = ASTSource(_take, signature, {(names.index(n),): v for n, v in constants.items()})
triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": False})
print("compiled")
"""


def test_the_kernel_compiles_for_a_gpu(tmp_path: Path) -> None:
    assert_compiles(COMPILED, tmp_path)
