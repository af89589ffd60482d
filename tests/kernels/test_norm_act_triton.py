"""BatchNorm, residual and ReLU in Triton, against float64: interpreted, and compiled for a GPU not there."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pcl_fast.kernels import norm_act
from pcl_fast.kernels.norm_act import NormState
from tests.gpu_compiler import assert_compiles
from tests.kernels.reference import LAST, copy_of, distance, image, in_float64, norm_state, outcome

pytest.importorskip("triton", reason="triton is not installed")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def there(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().to(DEVICE).requires_grad_(tensor.requires_grad)


def ours(
    x: Tensor, state: NormState, residual: Tensor | None, relu: bool, views: int, grad: Tensor
) -> tuple[list[Tensor], NormState]:
    """The output and all gradients, on the CPU; and the layer with its new running statistics."""
    from pcl_fast.kernels.norm_act_triton import TRITON

    x, residual = there(x), there(residual)  # type: ignore[assignment]
    names = ("weight", "bias", "running_mean", "running_var")
    state = replace(state, **{name: there(getattr(state, name).clone()) for name in names})
    found = outcome(
        lambda: norm_act.norm_act(x, state, residual, relu, views, TRITON),
        (x, state.weight, state.bias, residual),
        grad.to(DEVICE),
    )
    return [tensor.cpu() for tensor in found], replace(
        state, running_mean=state.running_mean.cpu(), running_var=state.running_var.cpu()
    )


def exact(
    x: Tensor, state: NormState, residual: Tensor | None, relu: bool, views: int, grad: Tensor
) -> tuple[list[Tensor], NormState]:
    """The same in plain torch and float64."""
    x64, residual64, state = in_float64(x), in_float64(residual), copy_of(state, double=True)
    assert x64 is not None
    found = outcome(
        lambda: norm_act.reference(x64, state, residual64, relu, views),
        (x64, state.weight, state.bias, residual64),
        grad,
    )
    return found, state


# Rows of a view: of several chunks, of a few tiles, of one; and tiles with a remainder.
CASES: list[tuple[tuple[int, ...], int, torch.dtype, bool, bool]] = [
    ((2, 16, 23, 25), 2, F32, True, True),
    ((4, 3, 5, 7), 2, F32, False, False),
    ((1, 24, 29, 27), 1, BF16, True, False),
    ((6, 64, 9, 7), 3, BF16, False, True),
    ((2, 64, 19, 17), 1, BF16, True, True),
    ((1, 130, 13, 11), 1, F32, True, True),
    ((3, 16, 1, 1), 1, F16, True, True),
    ((4, 36, 10, 6), 2, F16, False, True),
    ((2, 2, 40, 30), 1, F32, False, True),
    ((2, 1, 7, 5), 2, F32, True, True),
]


@pytest.mark.parametrize(("shape", "views", "dtype", "with_residual", "relu"), CASES, ids=str)
def test_it_is_batch_norm_addition_and_relu(shape, views, dtype, with_residual, relu):
    x, state = image(*shape, dtype=dtype, shift=3.0), norm_state(shape[1])
    residual = image(*shape, dtype=dtype) if with_residual else None
    grad = torch.randn(shape).to(dtype)
    found, found_state = ours(x, state, residual, relu, views, grad)
    expected, expected_state = exact(x, state, residual, relu, views, grad)
    # The interpreter truncates to bfloat16 where a GPU rounds, once: no two roundings fit within this.
    ulp = {F32: 2**-20, BF16: 2**-7, F16: 2**-10}[dtype]
    torch.testing.assert_close(found[0].double(), expected[0], rtol=ulp, atol=5e-5)
    bound = 1e-5 if dtype == F32 else ulp
    assert [d for d in map(distance, found, expected) if d > bound] == []
    assert [tensor.dtype for tensor in found] == [dtype, dtype, F32, F32, *[dtype] * with_residual]
    assert all(tensor.is_contiguous(memory_format=LAST) for tensor in found[:2])
    assert distance(found_state.running_mean, expected_state.running_mean) < 2e-6
    assert distance(found_state.running_var, expected_state.running_var) < 5e-6


@pytest.mark.parametrize(
    ("deviation", "bound", "variance_bound"), [(10.0, 1e-5, 5e-6), (1.0, 1e-4, 5e-6), (0.01, 5e-3, 2e-4)]
)
def test_a_large_mean_costs_no_precision(deviation, bound, variance_bound):
    """But that float32 knows the mean itself to 3e-5. Sums of squares would lose the variance altogether."""
    x = 1000 + deviation * torch.randn(2, 8, 23, 25)
    x, state = x.contiguous(memory_format=LAST).requires_grad_(), norm_state(8)
    state.running_var.zero_()
    given = (x, state, None, False, 2, torch.randn(x.shape))
    (found, found_state), (expected, expected_state) = ours(*given), exact(*given)
    assert max(map(distance, found, expected)) < bound
    assert distance(found_state.running_var, expected_state.running_var) < variance_bound


def test_a_first_row_far_off_costs_little():
    """It is what differences are taken from."""
    x = torch.randn(1, 8, 32, 32).contiguous(memory_format=LAST)
    x[:, :, 0, 0] = 1e4
    given = (x.requires_grad_(), norm_state(8), None, False, 1, torch.randn(x.shape))
    (found, found_state), (expected, expected_state) = ours(*given), exact(*given)
    assert max(map(distance, found, expected)) < 1e-3
    assert distance(found_state.running_var, expected_state.running_var) < 1e-3


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's
@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
def test_what_is_not_a_number_stays_so_in_its_view_and_channel(odd):
    x = image(4, 8, 5, 7, dtype=F32).detach()
    x[3, 5, 2, 2] = odd
    given = (x.requires_grad_(), norm_state(8), None, True, 2, torch.randn(x.shape))
    found, state = ours(*given)
    expected, expected_state = exact(*given)
    elsewhere = torch.ones(4, 8, dtype=torch.bool)
    elsewhere[2:, 5] = False
    assert found[0][elsewhere].isfinite().all()
    for mine, other in zip([*found, state.running_var], [*expected, expected_state.running_var], strict=True):
        assert torch.equal(mine.isfinite(), other.isfinite())
    assert found[1][elsewhere].isfinite().all()


def test_twice_gives_the_same_bits():
    given = (image(2, 8, 24, 24), norm_state(8), image(2, 8, 24, 24), True, 2, torch.randn(2, 8, 24, 24))
    (found, state), (again, state_again) = ours(*given), ours(*given)
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))
    assert torch.equal(state.running_mean, state_again.running_mean)
    assert torch.equal(state.running_var, state_again.running_var)


def test_more_chunks_than_are_added_up_at_a_time(monkeypatch):
    from pcl_fast.kernels import norm_act_triton

    given = (image(1, 8, 60, 60, dtype=F32), norm_state(8), None, True, 1, torch.randn(1, 8, 60, 60))
    monkeypatch.setattr(norm_act_triton, "SUMS", 32)
    plan = norm_act_triton.make_plan(given[0], 1)
    assert plan.grid[1] > 3 * (32 // plan.columns)
    (found, found_state), (expected, expected_state) = ours(*given), exact(*given)
    assert max(map(distance, found, expected)) < 1e-5
    assert distance(found_state.running_var, expected_state.running_var) < 5e-6


REAL = [(16, 32, 128), (32, 16, 128), (64, 8, 128), (168, 32, 64), (64, 112, 128), (256, 56, 128)]
REAL += [(2048, 7, 256), (64, 300, 256)]


@pytest.mark.parametrize("views", [1, 3, 8])
@pytest.mark.parametrize(("channels", "side", "batch"), REAL)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_real_sizes_fill_a_large_gpu(channels, side, batch, views, dtype):
    from pcl_fast.kernels.norm_act_triton import PROGRAMS, make_plan

    x = torch.empty(views * batch, channels, side, side, dtype=dtype, device="meta")
    plan = make_plan(x, views)
    blocks, chunks, _ = plan.grid
    assert plan.columns * blocks >= channels > plan.columns * (blocks - 1)
    assert plan.share * chunks >= plan.rows > plan.share * (chunks - 1)
    programs = blocks * chunks * views
    enough = 120 if x.numel() > 2**21 else 60
    assert enough <= programs <= max(PROGRAMS, blocks * views)
    sums_read = programs * chunks * plan.columns * 8
    assert sums_read <= 0.75 * x.numel() * x.element_size()


COMPILED = """
import re, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from pcl_fast.kernels import norm_act_jit, norm_act_triton

FLOATS = "parts weight bias running_mean running_var means invstds grad_weight grad_bias".split()
TYPES = dict.fromkeys(FLOATS, "*fp32") | {"momentum": "fp32", "eps": "fp32"}

def compiled(name, dtype, tile, columns, groups=None, rows="i32", **constants):
    kernel, size = getattr(norm_act_jit, name), 4 if dtype == "fp32" else 2
    names = kernel.arg_names
    constants |= {"STEP": 8, "COLUMNS": columns, "ROWS": tile // size // columns}
    constants |= {"CHUNKS": norm_act_triton.SUMS // columns} | ({"groups": groups} if groups else {})
    types = dict.fromkeys(names, "*" + dtype) | TYPES | {"rows": rows, "share": "i32", "groups": "i32"}
    signature = {n: "constexpr" if n in constants else types[n] for n in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n][0] == "*"}
    places = {(names.index(n),): value for n, value in constants.items()}
    options = {"num_warps": norm_act_triton.WARPS, "enable_fp_fusion": True}
    target = GPUTarget("cuda", 90, 32)
    made = triton.compile(ASTSource(kernel, signature, places, aligned), target=target, options=options)
    ptx = made.asm["ptx"]
    assert made.asm["cubin"]
    assert not re.findall(r"^\\s*(?:@\\S+ )?(?:atom|red)\\.", ptx, re.MULTILINE), "sums in any order"
    # Read ahead, 16 bytes at a time.
    assert re.search(r"cp\\.async\\.cg\\.shared\\.global \\[[^]]+\\], \\[[^]]+\\], 0x10", ptx), name

values, gradients = norm_act_triton.TILE, norm_act_triton.GRADIENT_TILE
compiled("sum_values", "fp16", values, 8, groups=1, rows="i64")
compiled("normalise", "bf16", values, 64, RELU=True)
compiled("normalise", "fp32", values, 32, rows="i64", residual=None, RELU=False)
compiled("sum_gradients", "bf16", gradients, 16)
compiled("sum_gradients", "fp32", gradients, 32, rows="i64", y=None, grad_residual=None)
compiled("find_gradient", "bf16", gradients, 64)
print("compiled")
"""


def test_they_compile_for_a_gpu_without_atomics_and_read_ahead(tmp_path: Path) -> None:
    assert_compiles(COMPILED, tmp_path)
