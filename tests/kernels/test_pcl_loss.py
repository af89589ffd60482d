"""PCL's loss and gradients in closed form against autograd, and in Triton against float64."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pcl_fast.config import PclConfig
from pcl_fast.contract import PeerOutputs
from pcl_fast.kernels.pcl_loss import LossRule, PclLoss, pcl_loss, reference, takes
from pcl_fast.objectives.pcl import Pcl
from pcl_fast.step.obstacles import find_obstacle
from tests.gpu_compiler import assert_compiles

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BOTH = LossRule(temperature=3.0, ensemble_teacher=True, mean_teachers=True)
NONE = LossRule(temperature=3.0, ensemble_teacher=False, mean_teachers=False)
RULES = [BOTH, replace(BOTH, mean_teachers=False), replace(BOTH, ensemble_teacher=False), NONE]

Batch = tuple[Tensor, Tensor, Tensor, Tensor]


def triton_loss(batch: Batch, rule: LossRule, weight: float = 0.37) -> PclLoss:
    """Of a batch on the CPU, to the CPU."""
    pytest.importorskip("triton", reason="triton is not installed")
    from pcl_fast.kernels.pcl_loss_triton import pcl_loss_triton

    z, z_t, q, labels = (tensor.to(DEVICE) for tensor in batch)
    made = pcl_loss_triton(z, z_t, q, labels, scalar(weight).to(DEVICE), rule)
    gradients = made.grad_logits_VBC.cpu(), made.grad_ensemble_BC.cpu()
    return PclLoss(made.terms.cpu(), made.correct.cpu(), *gradients)


def exact_loss(batch: Batch, rule: LossRule, weight: float = 0.37) -> PclLoss:
    z, z_t, q, labels = batch
    return reference(z.double(), z_t.double(), q.double(), labels, scalar(weight), rule)


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def random_batch(peers: int, batch: int, classes: int, dtype: torch.dtype = torch.float32) -> Batch:
    """Logits of peers, ensemble and mean teachers, and labels."""
    shapes = (peers, batch, classes), (batch, classes), (peers, batch, classes)
    z, z_t, q = (torch.randn(shape, dtype=torch.float64).mul_(3).to(dtype) for shape in shapes)
    return z, z_t, q, torch.randint(classes, (batch,))


def assert_close(found: PclLoss, expected: PclLoss, relative: float, absolute: float) -> None:
    """Terms are sums, which may cancel; `absolute` is for gradients, of a batch of any size."""
    batch = len(expected.grad_ensemble_BC)
    assert found.correct.tolist() == expected.correct.tolist()
    assert found.correct.dtype == torch.int64
    torch.testing.assert_close(found.terms.double(), expected.terms, rtol=1e-5, atol=1e-5)
    for name in ("grad_logits_VBC", "grad_ensemble_BC"):
        gradients = getattr(found, name).double(), getattr(expected, name).double()
        torch.testing.assert_close(*gradients, rtol=relative, atol=absolute / batch)


@pytest.mark.parametrize("classes", [2, 10, 100, 1000, 1003])
@pytest.mark.parametrize("peers", range(1, 9))
def test_the_closed_forms_are_autograds(peers: int, classes: int) -> None:
    z, z_t, q, labels = random_batch(peers, 3, classes, torch.float64)
    z, z_t = z.requires_grad_(), z_t.requires_grad_()
    for rule in [rule for rule in RULES if peers > 1 or not rule.mean_teachers]:
        options = PclConfig(
            num_peers=peers, ensemble_teacher=rule.ensemble_teacher, mean_teacher=rule.mean_teachers
        )
        said, taught = (PeerOutputs(logits, (), z_t) for logits in (z, q))
        for weight in (0.0, 0.37):
            terms = Pcl(options).terms(said, taught, labels, weight)
            gradients = torch.autograd.grad(terms.sum(), (z, z_t))
            found = pcl_loss(z, z_t, q if rule.mean_teachers else None, labels, scalar(weight), rule)
            torch.testing.assert_close(found.terms, terms.detach(), rtol=1e-12, atol=1e-13)
            torch.testing.assert_close(found.grad_logits_VBC, gradients[0], rtol=1e-10, atol=1e-14)
            torch.testing.assert_close(found.grad_ensemble_BC, gradients[1], rtol=1e-10, atol=1e-14)
            assert rule.num_terms(peers) == len(Pcl(options).term_names)


def test_the_gradients_are_finite_differences() -> None:
    z, z_t, q, labels = random_batch(3, 2, 5, torch.float64)
    gradients = exact_loss((z, z_t, q, labels), BOTH)
    # As a target the ensemble is a constant, which a difference does not see: it has its cross-entropy only.
    cases = [(z, BOTH, gradients.grad_logits_VBC), (z_t, NONE, gradients.grad_ensemble_BC)]
    for logits, rule, gradient in cases:
        for place, expected in zip(logits.view(-1).split(1), gradient.view(-1), strict=True):
            sums: list[Tensor] = []
            for step in (1e-5, -2e-5):
                place.add_(step)
                sums.append(exact_loss((z, z_t, q, labels), rule).terms.sum())
            place.add_(1e-5)
            torch.testing.assert_close((sums[0] - sums[1]) / 2e-5, expected, rtol=1e-7, atol=1e-9)


def test_right_answers_are_counted_and_of_equals_the_first_counts() -> None:
    z = torch.tensor([[0.0, 2, 2, 1], [5, 5, 5, 5], [-1, -3, -2, -1], [0, 0, 0, 9]]).expand(2, -1, -1).clone()
    z[1] += torch.eye(4)  # every row's own class, if only by that
    for labels, first in (([1, 0, 0, 3], 4), ([2, 1, 3, 3], 1)):
        batch = (z, z[0], z, torch.tensor(labels))
        own = sum(int(z[1, i].argmax()) == label for i, label in enumerate(labels))
        assert exact_loss(batch, BOTH).correct.tolist() == [first, own, first]
        assert triton_loss(batch, BOTH).correct.tolist() == [first, own, first]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_logits_are_taken_as_they_are_and_lose_nothing_inside(dtype: torch.dtype) -> None:
    z, z_t, q, labels = random_batch(3, 4, 10, dtype)
    found = pcl_loss(z, z_t, q, labels, scalar(0.37), BOTH)
    whole = pcl_loss(z.float(), z_t.float(), q.float(), labels, scalar(0.37), BOTH)
    assert torch.equal(found.terms, whole.terms)
    assert found.terms.dtype == torch.float32
    assert torch.equal(found.grad_logits_VBC, whole.grad_logits_VBC.to(dtype))
    assert torch.equal(found.grad_ensemble_BC, whole.grad_ensemble_BC.to(dtype))


def test_a_graph_can_hold_the_reference() -> None:
    z, z_t, q, labels = random_batch(3, 4, 10)
    weight = scalar(0.37)
    assert find_obstacle(lambda: reference(z, z_t, q, labels, weight, BOTH)) is None


SHAPES = [(1, 3, 2), (2, 1, 10), (3, 3, 100), (3, 1, 1003), (5, 1, 2500), (8, 2, 1000), (3, 2, 1)]


@pytest.mark.parametrize("rule", RULES, ids=["both", "pe", "pm", "ce"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_triton_is_the_reference_in_float64(shape: tuple[int, int, int], rule: LossRule) -> None:
    rule = replace(rule, mean_teachers=rule.mean_teachers and shape[0] > 1)
    batch = random_batch(*shape)
    assert_close(triton_loss(batch, rule), exact_loss(batch, rule), 1e-5, 2e-7)


def test_the_reference_in_float32_is_as_exact() -> None:
    z, z_t, q, labels = random_batch(8, 16, 1000)
    found = pcl_loss(z, z_t, q, labels, scalar(0.37).float(), BOTH)
    assert_close(found, exact_loss((z, z_t, q, labels), BOTH), 1e-5, 2e-7)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_triton_at_any_temperature_and_weight(weight: float, temperature: float) -> None:
    batch, rule = random_batch(3, 2, 7), replace(BOTH, temperature=temperature)
    assert_close(triton_loss(batch, rule, weight), exact_loss(batch, rule, weight), 1e-5, 2e-7)


@pytest.mark.parametrize("classes", [16, 33])
def test_classes_in_many_chunks_and_samples_in_many_blocks(
    classes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = pytest.importorskip("pcl_fast.kernels.pcl_loss_triton")
    monkeypatch.setattr(module, "BLOCK", 32)  # 4 rows of 8
    monkeypatch.setattr(module, "SUMMED", 2)
    batch = random_batch(3, 3, classes)
    batch[0][:, 0] = torch.linspace(-50, 50, classes)  # the maximum comes last, or
    batch[2][:, 1] = torch.linspace(50, -50, classes)  # first
    assert_close(triton_loss(batch, BOTH), exact_loss(batch, BOTH), 1e-5, 2e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_triton_in_half_precision(dtype: torch.dtype) -> None:
    batch = random_batch(3, 3, 100, dtype)
    found = triton_loss(batch, BOTH)
    assert found.grad_logits_VBC.dtype == found.grad_ensemble_BC.dtype == dtype
    # The interpreter truncates to bfloat16 where a GPU rounds.
    assert_close(found, exact_loss(batch, BOTH), 2**-7 if dtype == torch.bfloat16 else 2**-10, 1e-6)


def test_triton_with_float16_teachers_of_float32_peers() -> None:
    """As a step in float16 has them, whose loss is scaled."""
    z, z_t, q, labels = random_batch(3, 3, 100)
    batch = z, z_t, q.half(), labels
    found = triton_loss(batch, BOTH)
    assert found.grad_logits_VBC.dtype == torch.float32
    assert_close(found, exact_loss(batch, BOTH), 1e-5, 2e-7)


def test_triton_gives_the_same_bits_again() -> None:
    batch = random_batch(3, 3, 1003)
    first, second = triton_loss(batch, BOTH), triton_loss(batch, BOTH)
    for name in ("terms", "correct", "grad_logits_VBC", "grad_ensemble_BC"):
        assert torch.equal(getattr(first, name), getattr(second, name))


def test_logits_may_lie_in_memory_as_they_like() -> None:
    z, z_t, q, labels = random_batch(3, 2, 10)
    expected = triton_loss((z, z_t, q, labels), BOTH)
    by_sample = z.transpose(0, 1).contiguous().transpose(0, 1)
    by_class = q.transpose(1, 2).contiguous().transpose(1, 2)
    every_other = torch.stack([labels, labels], 1)[:, 0]
    assert not by_sample.is_contiguous()
    assert by_class.stride(-1) != 1
    for ensemble in (z_t.T.contiguous().T, torch.cat([z_t, z_t], 1)[:, :10]):
        found = triton_loss((by_sample, ensemble, by_class, every_other), BOTH)
        for name in ("terms", "correct", "grad_logits_VBC", "grad_ensemble_BC"):
            assert torch.equal(getattr(found, name), getattr(expected, name))


def test_extreme_logits_overflow_nowhere() -> None:
    sure = torch.full((3, 2, 10), -1e4)
    sure[..., 0] = 1e4
    labels = torch.tensor([0, 1])
    for z in (sure.roll(1, -1), sure, torch.zeros_like(sure)):
        batch = (z, sure[0], sure, labels)
        expected = exact_loss(batch, BOTH)
        assert expected.terms.isfinite().all()
        assert_close(triton_loss(batch, BOTH), expected, 1e-5, 2e-7)


@pytest.mark.parametrize("where", [0, 1, 2], ids=["peer", "ensemble", "teacher"])
def test_what_is_not_a_number_reaches_the_terms_it_belongs_to(where: int) -> None:
    """And no others: those of the other peers and of the other sample stay as they are."""
    batch = random_batch(3, 2, 10)
    clean = exact_loss(batch, BOTH)
    batch[where][(0, 1, 4) if where == 0 else (..., 1, 4)] = float("nan")
    # The terms: ce/peer1..3, ce/ensemble, pe/peer1..3, pm/peer1..3.
    hit = ([0, 4, 7], [3, 4, 5, 6], [7, 8, 9])[where]
    for found in (exact_loss(batch, BOTH), triton_loss(batch, BOTH)):
        assert found.terms.isnan().nonzero()[:, 0].tolist() == hit
        touched = found.grad_ensemble_BC if where == 1 else found.grad_logits_VBC[0]
        assert touched[1].isnan().any()
        torch.testing.assert_close(found.grad_logits_VBC[:, 0].double(), clean.grad_logits_VBC[:, 0])


def test_a_label_that_is_no_class_is_no_small_loss() -> None:
    for wrong in (-1, 2**40):
        batch = (*random_batch(3, 2, 10)[:3], torch.tensor([3, wrong]))
        assert triton_loss(batch, BOTH).terms[:4].isnan().all()


def test_what_does_not_fit_together_is_refused() -> None:
    z, z_t, q, labels = random_batch(3, 2, 10)
    assert takes(z, z_t, q) == z.is_cuda
    for wrong, match in (
        ((z, z_t[:1], q, labels), "1, 10"),
        ((z, z_t, None, labels), "needs the mean teachers"),
        ((z, z_t, q[:2], labels), "2, 2, 10"),
        ((z, z_t, q, labels.int()), "int32"),
        ((z, z_t, q, labels[:1]), "1"),
        ((z[:1], z_t, q[:1], labels), "its own mean teacher"),
    ):
        with pytest.raises(AssertionError, match=match):
            pcl_loss(*wrong, scalar(1), BOTH)


COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from pcl_fast.kernels.pcl_loss_triton import SUMMED, _lose, _sum_up

def compiled(kernel, types, constants, warps):
    names = kernel.arg_names
    places = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, {name: types.get(name, "constexpr") for name in names}, places)
    options = {"num_warps": warps, "enable_fp_fusion": True}
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert made.asm["cubin"]
    return made.asm["ptx"]

strides = "logits_peer logits_sample ensemble_sample teacher_peer teacher_sample batch".split()
types = dict.fromkeys(strides, "i32") | dict.fromkeys("temperature inverse share".split(), "fp32")
types |= {"labels": "*i64", "weight": "*fp64", "table": "*fp32"}
pointers = "logits ensemble teacher grad_logits grad_ensemble".split()

def loss(dtype, peers, rows, classes, chunk, ensemble, teachers, warps):
    sizes = {"PEERS": peers, "ROWS": rows, "CLASSES": classes, "CHUNK": chunk, "COLUMNS": 20}
    rule = {"BY_ENSEMBLE": ensemble, "BY_TEACHERS": teachers}
    ptx = compiled(_lose, types | dict.fromkeys(pointers, dtype), sizes | rule, warps)
    assert "atom" not in ptx and "red.global" not in ptx

loss("*bf16", 3, 4, 100, 128, True, True, 1)
loss("*fp16", 1, 1, 22000, 8192, True, False, 16)
table = {"table": "*fp32", "terms": "*fp32", "correct": "*i64", "batch": "i32"}
compiled(_sum_up, table, {"TERMS": 10, "COLUMNS": 14, "BLOCK": SUMMED}, 4)
print("compiled")
"""


def test_it_compiles_for_a_gpu_without_atomics(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    assert_compiles(COMPILED, tmp_path)
