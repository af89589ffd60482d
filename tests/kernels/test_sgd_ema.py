"""The update of all weights against torch's optimizer and averages, and in Triton against plain torch."""

import itertools
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pcl_fast.kernels import sgd_ema as module
from pcl_fast.kernels.sgd_ema import CACHED, FlatBuffers, SgdRule, reference, sgd_ema, takes
from pcl_fast.step.obstacles import find_obstacle
from tests.gpu_compiler import assert_compiles

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NESTEROV = SgdRule(momentum=0.9, weight_decay=5e-4, nesterov=True)
RULES = [NESTEROV, replace(NESTEROV, nesterov=False), replace(NESTEROV, momentum=0.0, nesterov=False)]
SIZES = [1, 1023, 1024, 1025, 5000]

Update = Callable[[FlatBuffers, SgdRule, Tensor, Tensor, Tensor], None]


def triton_update(*arguments) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    from pcl_fast.kernels.sgd_ema_triton import sgd_ema_triton

    sgd_ema_triton(*arguments)


def scalar(value: float, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.full((), value, dtype=dtype, device=DEVICE)


GO, HALT = (scalar(value, torch.float32) for value in (0, 1))


def random_buffers(size: int, dtype: torch.dtype = torch.float32) -> FlatBuffers:
    values, gradients, momentum, averages = torch.randn(4, size, dtype=dtype, device=DEVICE).unbind()
    halves = values.bfloat16(), averages.bfloat16()
    return FlatBuffers(
        values=values,
        gradients=gradients,
        momentum=momentum,
        averages=averages,
        half_values=halves[0],
        half_averages=halves[1],
    )


def copy_of(buffers: FlatBuffers) -> FlatBuffers:
    return replace(buffers, **{name: buffer.clone() for name, buffer in buffers.named()})


def assert_same_bits(found: FlatBuffers, expected: FlatBuffers) -> None:
    for (name, one), (_, other) in zip(found.named(), expected.named(), strict=True):
        integers = {2: torch.int16, 4: torch.int32}[one.element_size()]
        assert torch.equal(one.view(integers), other.view(integers)), name


@pytest.mark.parametrize("rule", RULES, ids=["nesterov", "heavy ball", "plain"])
@pytest.mark.parametrize("size", [*SIZES, 3 * CACHED + 1])
def test_it_is_torchs_sgd(size: int, rule: SgdRule) -> None:
    buffers = random_buffers(size, torch.float64)
    buffers.momentum.zero_()
    weights = torch.nn.Parameter(buffers.values.clone())
    optimizer = torch.optim.SGD([weights], lr=1.0, foreach=False, fused=False, **asdict(rule))
    lr = scalar(0)
    for step in range(4):
        lr.fill_(0.1 / (step + 1))
        optimizer.param_groups[0]["lr"] = lr.item()
        weights.grad = torch.randn_like(weights)
        buffers.gradients.copy_(weights.grad)
        optimizer.step()
        sgd_ema(buffers, rule, lr, scalar(0.5), GO)
        assert torch.equal(buffers.gradients, weights.grad)
        torch.testing.assert_close(buffers.values, weights.detach(), rtol=1e-13, atol=1e-14)
    if rule.momentum:
        expected = optimizer.state[weights]["momentum_buffer"]
        torch.testing.assert_close(buffers.momentum, expected, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("size", [1, 1025])
def test_averages_are_torchs(size: int) -> None:
    """Those of torch copy the first weights, as phi = 0 does."""
    buffers = random_buffers(size, torch.float64)
    network = torch.nn.Linear(size, 1, bias=False, dtype=torch.float64, device=DEVICE)
    averaged = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.7))
    assert buffers.averages is not None
    for step in range(5):
        sgd_ema(buffers, NESTEROV, scalar(0.3), scalar(0.7 if step else 0), GO)
        network.weight.data.copy_(buffers.values)
        averaged.update_parameters(network)
        expected = next(averaged.parameters()).detach()[0]
        torch.testing.assert_close(buffers.averages, expected, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("rule", RULES, ids=["nesterov", "heavy ball", "plain"])
@pytest.mark.parametrize("size", SIZES)
def test_triton_is_plain_torch(size: int, rule: SgdRule) -> None:
    """Within two units in the last place of the numbers, about 1, that are added: products may be fused."""
    ours = random_buffers(size)
    plain = copy_of(ours)
    for lr, phi in ((0.1, 0.3), (0.02, 0.999)):
        triton_update(ours, rule, scalar(lr), scalar(phi), GO)
        reference(plain, rule, scalar(lr), scalar(phi), GO)
        for name in ("values", "momentum", "averages"):
            found, expected = getattr(ours, name), getattr(plain, name)
            torch.testing.assert_close(found, expected, rtol=2**-22, atol=2**-22, msg=name)
        assert torch.equal(ours.gradients, plain.gradients)
        ours = copy_of(plain)


@pytest.mark.parametrize("update", [triton_update, reference], ids=["triton", "torch"])
def test_halves_are_torchs_bfloat16_of_any_bits(update: Update) -> None:
    """Ties, subnormal and infinite numbers and what is none among them: averages pass where phi is 1."""
    anything = torch.randint(-(2**31), 2**31, (4096,), dtype=torch.int32)
    special = torch.tensor([0, -0.0, float("inf"), float("-inf"), 3.4e38, -3.4e38, 1e-45, 1e-40])
    ones = torch.tensor([-1, 2**31 - 1], dtype=torch.int32)  # no number; rounding up would reach another
    bits = torch.cat([anything, (anything & ~0xFFFF) | 0x8000, special.view(torch.int32), ones])
    quiet = 0x400000  # what is not a number and has this bit off is an error to numpy
    averages = (
        torch.where(bits.view(torch.float32).isnan(), bits | quiet, bits).view(torch.float32).to(DEVICE)
    )
    buffers = replace(random_buffers(len(averages)), averages=averages)
    update(buffers, NESTEROV, scalar(0.1), scalar(1), GO)
    expected = averages.bfloat16()
    for half, whole in ((buffers.half_values, buffers.values.bfloat16()), (buffers.half_averages, expected)):
        torch.testing.assert_close(half, whole, rtol=0, atol=0, equal_nan=True)
    assert 0 < expected.isnan().sum() < len(expected) / 8


@pytest.mark.parametrize("update", [triton_update, reference], ids=["triton", "torch"])
@pytest.mark.parametrize("size", [1, 1025])
def test_a_stop_leaves_everything_as_it_was(size: int, update: Update) -> None:
    buffers = random_buffers(size)
    buffers.gradients.fill_(float("nan"))[0] = float("inf")
    before = copy_of(buffers)
    update(buffers, NESTEROV, scalar(0.1), scalar(0.5), HALT)
    assert_same_bits(buffers, before)
    update(buffers, NESTEROV, scalar(0.1), scalar(0.5), GO)
    assert not buffers.values.isfinite().any()


def test_triton_leaves_also_what_was_not_finite_or_no_copy() -> None:
    buffers = replace(
        random_buffers(1025), half_values=torch.zeros(1025, dtype=torch.bfloat16, device=DEVICE)
    )
    buffers.values[3], buffers.momentum[5] = float("inf"), float("nan")
    before = copy_of(buffers)
    triton_update(buffers, NESTEROV, scalar(0.1), scalar(0.5), HALT)
    assert_same_bits(buffers, before)


@pytest.mark.parametrize("update", [triton_update, reference], ids=["triton", "torch"])
def test_phi_0_copies_and_phi_1_changes_nothing(update: Update) -> None:
    buffers = random_buffers(1025)
    before = copy_of(buffers)
    update(buffers, NESTEROV, scalar(0.1), scalar(1), GO)
    assert not torch.equal(buffers.values, before.values)
    for name in ("averages", "half_averages"):
        assert torch.equal(getattr(buffers, name), getattr(before, name))
    update(buffers, NESTEROV, scalar(0.1), scalar(0), GO)
    assert buffers.averages is not None
    assert torch.equal(buffers.averages, buffers.values)


@pytest.mark.parametrize("update", [triton_update, reference], ids=["triton", "torch"])
def test_what_is_not_there_changes_nothing_else(update: Update) -> None:
    whole = random_buffers(1025)
    optional = ("averages", "half_values", "half_averages")
    variants = [
        dict.fromkeys(gone)
        for number in (1, 2, 3)
        for gone in itertools.combinations(optional, number)
        if "averages" not in gone or "half_averages" in gone
    ]
    parts = [copy_of(replace(whole, **gone)) for gone in variants]
    update(whole, NESTEROV, scalar(0.1), scalar(0.5), GO)
    for part, gone in zip(parts, variants, strict=True):
        update(part, NESTEROV, scalar(0.1), scalar(0.5), GO)
        assert_same_bits(part, replace(whole, **gone))
    assert len(variants) == 5


def test_cutting_a_cpus_work_into_parts_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of parts that are whole vectors of the processor: torch rounds what is left at the end otherwise."""
    whole = random_buffers(1025)
    cut = copy_of(whole)
    reference(whole, NESTEROV, scalar(0.1), scalar(0.5), GO)
    monkeypatch.setattr(module, "CACHED", 64)
    reference(cut, NESTEROV, scalar(0.1), scalar(0.5), GO)
    assert_same_bits(cut, whole)


def test_a_graph_can_hold_the_reference() -> None:
    buffers, lr, phi = random_buffers(1025), scalar(0.1), scalar(0.5)
    assert find_obstacle(lambda: reference(buffers, NESTEROV, lr, phi, GO)) is None
    assert find_obstacle(lambda: bool(phi > 0)) is not None


def test_no_weights_are_no_trouble() -> None:
    for update in (sgd_ema, triton_update):
        buffers = random_buffers(0)
        update(buffers, NESTEROV, scalar(0.1), scalar(0.5), GO)
        assert all(buffer.shape == (0,) for _, buffer in buffers.named())


def test_buffers_that_do_not_belong_together_are_refused() -> None:
    good = random_buffers(8)
    assert takes(good.values) == good.values.is_cuda
    for wrong in (
        {"momentum": torch.zeros(7, device=DEVICE)},
        {"gradients": torch.zeros(8, dtype=torch.float64, device=DEVICE)},
        {"half_values": torch.zeros(8, dtype=torch.float16, device=DEVICE)},
        {"averages": torch.zeros(16, device=DEVICE)[::2]},
        {"averages": None},
    ):
        with pytest.raises(AssertionError, match=next(iter(wrong))):
            replace(good, **wrong)


COMPILED = """
import re, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from pcl_fast.kernels.sgd_ema_triton import BLOCK, WARPS, _update

buffers = dict.fromkeys("values gradients momentum averages".split(), "*fp32")
buffers |= {"half_values": "*i16", "half_averages": "*i16"}
numbers = {"lr": "*fp64", "phi": "*fp64", "stop": "*fp32", "mu": "fp32", "decay": "fp32"}

def compiled(constants, count="i32"):
    names = _update.arg_names
    constants = {"BLOCK": BLOCK, "NESTEROV": True, "MOVES": True} | constants
    types = buffers | numbers | {"count": count} | dict.fromkeys(constants, "constexpr")
    places = {(names.index(name),): value for name, value in constants.items()}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in buffers if name not in constants}
    source = ASTSource(_update, {name: types[name] for name in names}, places, aligned)
    options = {"num_warps": WARPS, "enable_fp_fusion": True}
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert made.asm["cubin"]
    return made.asm["ptx"]

ptx = compiled({})
wide = re.findall(r"(?:ld|st)\\.global\\.v\\d\\.b32", ptx)
assert sorted(wide) == ["ld.global.v4.b32"] * 4 + ["st.global.v2.b32"] * 2 + ["st.global.v4.b32"] * 3, wide
assert "shared" not in ptx
none = {"averages": None, "half_averages": None, "half_values": None}
compiled(none | {"MOVES": False, "NESTEROV": False}, count="i64")
print("compiled")
"""


def test_it_compiles_for_a_gpu_with_the_widest_accesses_and_no_detour(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    assert_compiles(COMPILED, tmp_path)
