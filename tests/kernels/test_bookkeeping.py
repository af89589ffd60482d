"""The books of a step: by hand, and in Triton against plain torch."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pcl_fast.kernels.bookkeeping import Latch, add_up, look_up, watch
from tests.gpu_compiler import assert_compiles

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BY_EPOCH = torch.tensor([[0.1, 0.01, 0.001], [1 / 3, 2 / 3, 1.0]], dtype=torch.float64, device=DEVICE)
BY_STEP = torch.tensor([[0.0, 0.5, 2 / 3, 0.75], [1.0, 1.1, 0.3, 0.7]], dtype=torch.float64, device=DEVICE)


def both(name: str) -> list:
    """The public function as it runs here, and the Triton one."""
    pytest.importorskip("triton", reason="triton is not installed")
    from pcl_fast.kernels import bookkeeping_triton

    public = {"look_up": look_up, "watch": watch, "add_up": add_up}[name]
    return [public, getattr(bookkeeping_triton, f"{name}_triton")]


def number(value: int) -> Tensor:
    return torch.full((), value, dtype=torch.int64, device=DEVICE)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("step", [1, 2, 4, 5, 6, 10, 14, 15])
def test_tables_are_read_at_the_epoch_and_the_step(step: int, rows: int) -> None:
    """Three epochs of five steps; the last column by step stands for all later ones. Products to the bit."""
    for function in both("look_up"):
        found = function(number(step), BY_EPOCH[:rows], BY_STEP[:rows], 5)
        assert found.dtype == torch.float64
        pairs = zip(BY_EPOCH[:rows].tolist(), BY_STEP[:rows].tolist(), strict=True)
        expected = [of_epoch[(step - 1) // 5] * of_step[min(step, 4) - 1] for of_epoch, of_step in pairs]
        assert found.tolist() == expected


def fresh_latch(width: int) -> Latch:
    return Latch(torch.zeros(width, dtype=torch.bool, device=DEVICE), number(0))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_first_bad_step_is_latched(bad: float, dtype: torch.dtype) -> None:
    for function in both("watch"):
        latch = fresh_latch(5)
        terms = torch.tensor([1.0, -2.0, torch.finfo(torch.float32).max, 0.0], dtype=dtype, device=DEVICE)
        norm = torch.ones((), dtype=dtype, device=DEVICE)
        assert function([terms, norm], latch, number(6)).item() == 0
        assert latch.bad.tolist() == [False] * 5
        broken = terms.clone()
        broken[1] = bad
        stop = function([broken, norm], latch, number(7))
        assert (stop.item(), stop.dtype, stop.shape) == (1, torch.float32, torch.Size([]))
        assert function([terms, norm * bad], latch, number(8)).item() == 1
        assert function([terms, norm], latch, number(9)).item() == 1
        assert latch.bad.tolist() == [False, True, False, False, False]
        assert latch.step.item() == 7


def test_a_bad_scalar_beside_good_values_is_seen() -> None:
    for function in both("watch"):
        latch = fresh_latch(4)
        values = [torch.ones(3, device=DEVICE), torch.tensor(math.nan, device=DEVICE)]
        assert function(values, latch, number(1)).item() == 1
        assert latch.bad.tolist() == [False, False, False, True]
        alone = fresh_latch(3)
        assert function(values[:1], alone, number(1)).item() == 0


@pytest.mark.parametrize("totals", [1, 2])
def test_a_step_is_added_in_double_precision(totals: int) -> None:
    for function in both("add_up"):
        sums = [torch.arange(6, dtype=torch.float64, device=DEVICE) + 2.0**40 for _ in range(totals)]
        terms, norm = torch.tensor([0.1, 0.2, 0.3], device=DEVICE), torch.tensor(0.7, device=DEVICE)
        counts = torch.tensor([5, 100], device=DEVICE)
        function(sums, [terms, norm], counts, 128)
        added = [*(torch.cat([terms, norm[None]]) * 128).double().tolist(), 5.0, 100.0]
        for total in sums:
            assert total.tolist() == [2.0**40 + place + value for place, value in enumerate(added)]


COMPILED = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from pcl_fast.kernels import bookkeeping_triton as own

def compiled(function, types, constants):
    names = function.arg_names
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    source = ASTSource(function, signature, {(names.index(n),): v for n, v in constants.items()})
    triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": True})

tables = {"step": "*i64", "by_epoch": "*fp64", "by_step": "*fp64", "found": "*fp64"}
compiled(own._look_up, tables, {"ROWS": 3, "BLOCK": 4})
values = {"first": "*fp32", "second": "*fp32"}
latch = {"bad": "*u8", "bad_step": "*i64", "step": "*i64", "stop": "*fp32"}
compiled(own._watch, values | latch, {"BLOCK": 16})
compiled(own._add_up, values | {"one": "*fp64", "other": "*fp64", "counts": "*i64"}, {"BLOCK": 16})
print("compiled")
"""


def test_the_kernels_compile_for_a_gpu(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    assert_compiles(COMPILED, tmp_path)
