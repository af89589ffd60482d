"""PCL's loss and its gradients in two launches, in Triton.

A program of the first takes one sample: two passes over the classes, in chunks, the first for maxima and sums
of exponentials, the second for losses and gradients. It writes its losses and right answers to a row of a
table, which the second launch sums up: no atomics, so that the same logits always give the same bits. Nothing
synchronises, and the host knows all shapes, so this can be captured in a CUDA graph.
"""
# Kernels take pointers and strides, which have no types and are many.
# pyright: basic, reportGeneralTypeIssues=false, reportCallIssue=false
# ruff: noqa: PLR0913, PLR0917

import torch
import triton
import triton.language as tl
from torch import Tensor

from pcl_fast.kernels.pcl_loss import LossRule, PclLoss

BLOCK = 8192  # logits of all peers that a program holds at once, at most
THREAD = 16  # of which a thread holds this many: a handful of such arrays fit its registers
MOST_WARPS = 16
SUMMED = 256  # samples that the second launch reads at once


def pcl_loss_triton(
    logits_VBC: Tensor,
    ensemble_BC: Tensor,
    teacher_VBC: Tensor | None,
    labels_B: Tensor,
    weight: Tensor,
    rule: LossRule,
) -> PclLoss:
    """What `pcl_loss.pcl_loss` does, in float32. A label that is no class makes terms that are no numbers."""
    peers, batch, classes = logits_VBC.shape
    logits_VBC, ensemble_BC = _dense(logits_VBC), _dense(ensemble_BC)
    teacher_VBC = _dense(teacher_VBC) if rule.mean_teachers and teacher_VBC is not None else logits_VBC
    heads, num_terms = peers + 1, rule.num_terms(peers)
    made = PclLoss(
        terms=torch.empty(num_terms, dtype=torch.float32, device=labels_B.device),
        correct=torch.empty(heads, dtype=torch.int64, device=labels_B.device),
        grad_logits_VBC=torch.empty_like(logits_VBC, memory_format=torch.contiguous_format),
        grad_ensemble_BC=torch.empty_like(ensemble_BC, memory_format=torch.contiguous_format),
    )
    table = made.terms.new_empty(batch, num_terms + heads)
    rows = triton.next_power_of_2(peers)
    chunk = min(triton.next_power_of_2(classes), max(1, BLOCK // rows))
    _lose[(batch,)](
        logits_VBC, ensemble_BC, teacher_VBC, labels_B.contiguous(), weight,
        table, made.grad_logits_VBC, made.grad_ensemble_BC,
        *logits_VBC.stride()[:2], ensemble_BC.stride(0), *teacher_VBC.stride()[:2],
        batch, float(rule.temperature), 1 / rule.temperature, 1 / batch,
        PEERS=peers, ROWS=rows, CLASSES=classes, CHUNK=chunk, COLUMNS=num_terms + heads,
        BY_ENSEMBLE=rule.ensemble_teacher, BY_TEACHERS=rule.mean_teachers,
        num_warps=max(1, min(MOST_WARPS, rows * chunk // (32 * THREAD))), enable_fp_fusion=True,
    )  # fmt: skip
    _sum_up[(num_terms + heads,)](
        table, made.terms, made.correct, batch,
        TERMS=num_terms, COLUMNS=num_terms + heads, BLOCK=SUMMED, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return made


def _dense(logits: Tensor) -> Tensor:
    """The kernel takes any strides but that of the classes."""
    return logits if logits.stride(-1) == 1 else logits.contiguous()


@triton.jit
def _lose(
    logits, ensemble, teacher, labels, weight, table, grad_logits, grad_ensemble,
    logits_peer, logits_sample, ensemble_sample, teacher_peer, teacher_sample,
    batch, temperature, inverse, share,
    PEERS: tl.constexpr, ROWS: tl.constexpr, CLASSES: tl.constexpr, CHUNK: tl.constexpr,
    COLUMNS: tl.constexpr, BY_ENSEMBLE: tl.constexpr, BY_TEACHERS: tl.constexpr,
):  # fmt: skip
    """All losses of one sample, a row of the table; and the gradients of its logits."""
    sample = tl.program_id(0).to(tl.int64)
    row, one = tl.arange(0, ROWS), tl.arange(0, 1)
    # A power of two: rows beyond the peers are the last peer again, and end in no sum and no store.
    is_peer, peer = row < PEERS, tl.minimum(row, PEERS - 1).to(tl.int64)
    label = tl.load(labels + sample)
    logits += peer * logits_peer + sample * logits_sample
    ensemble += one + sample * ensemble_sample
    teacher += peer * teacher_peer + sample * teacher_sample
    hard, right, peers = _scan(logits, label, inverse, CLASSES, CHUNK)
    hard_e, right_e, whole = _scan(ensemble, label, inverse, CLASSES, CHUNK)
    teachers = peers
    if BY_TEACHERS:
        _, _, teachers = _scan(teacher, label, inverse, CLASSES, CHUNK)
    force = tl.load(weight).to(tl.float32) * temperature
    grad_logits += (peer * batch + sample) * CLASSES
    grad_ensemble += (one + sample) * CLASSES
    by_ensemble, by_teachers = _differentiate(
        (peers, whole, teachers), (grad_logits, grad_ensemble), is_peer, label, force, inverse, share,
        PEERS, CLASSES, CHUNK, BY_ENSEMBLE, BY_TEACHERS,
    )  # fmt: skip
    table += sample * COLUMNS
    tl.store(table + row, hard, mask=is_peer)
    tl.store(table + PEERS + one, hard_e)
    table += PEERS + 1
    if BY_ENSEMBLE:
        tl.store(table + row, force * temperature * by_ensemble, mask=is_peer)
        table += PEERS
    if BY_TEACHERS:
        tl.store(table + row, force * temperature * by_teachers, mask=is_peer)
        table += PEERS
    tl.store(table + row, right, mask=is_peer)
    tl.store(table + PEERS + one, right_e)


@triton.jit
def _scan(rows, label, inverse, CLASSES: tl.constexpr, CHUNK: tl.constexpr):
    """Of rows of logits: their cross-entropies; 1 for each that is right, or 0; and what `_soften` needs."""
    answer = tl.load(rows + tl.minimum(tl.maximum(label, 0), CLASSES - 1)).to(tl.float32)
    answer = tl.where((label >= 0) & (label < CLASSES), answer, float("nan"))
    top = tl.full([rows.shape[0]], float("-inf"), tl.float32)
    total, soft = tl.zeros([rows.shape[0]], tl.float32), tl.zeros([rows.shape[0]], tl.float32)
    beaten = tl.zeros([rows.shape[0]], tl.int32)
    for start in range(0, CLASSES, CHUNK):
        place = start + tl.arange(0, CHUNK)
        known = (place < CLASSES)[None, :]
        z = tl.load(rows[:, None] + place[None, :], mask=known, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(top, tl.max(z, 1))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(z - higher[:, None]), 1)
        soft = soft * tl.exp((top - higher) * inverse) + tl.sum(tl.exp((z - higher[:, None]) * inverse), 1)
        top = higher
        # Of equal logits the first counts; and nothing is below what is not a number.
        below = tl.where((place < label)[None, :], z < answer[:, None], z <= answer[:, None])
        beaten += tl.sum((known & (place != label)[None, :] & ~below).to(tl.int32), 1)
    right = ((beaten == 0) & (answer == answer)).to(tl.float32)  # noqa: PLR0124  # nor is it right
    return tl.log(total) + (top - answer), right, (rows, top, total, tl.log(soft))


@triton.jit
def _differentiate(
    scanned, gradients, is_peer, label, force, inverse, share,
    PEERS: tl.constexpr, CLASSES: tl.constexpr, CHUNK: tl.constexpr,
    BY_ENSEMBLE: tl.constexpr, BY_TEACHERS: tl.constexpr,
):  # fmt: skip
    """Store the gradients; returns the divergences from the ensemble and from the other mean teachers."""
    peers, whole, teachers = scanned
    by_ensemble = tl.zeros([is_peer.shape[0]], tl.float32)
    by_teachers = by_ensemble
    for start in range(0, CLASSES, CHUNK):
        place = start + tl.arange(0, CHUNK)
        known, hit = (place < CLASSES)[None, :], (place == label)[None, :].to(tl.float32)
        p, log_soft = _soften(peers, place, inverse, CLASSES)
        p_e, log_soft_e = _soften(whole, place, inverse, CLASSES)
        gradient, soft = p - hit, tl.exp(log_soft)
        if BY_ENSEMBLE:
            target = tl.where(known, tl.exp(log_soft_e), 0.0)
            by_ensemble += tl.sum(target * (log_soft_e - log_soft), 1)
            gradient += force * (soft - target)
        if BY_TEACHERS:
            _, log_q = _soften(teachers, place, inverse, CLASSES)
            q = tl.where(known & is_peer[:, None], tl.exp(log_q), 0.0)
            target = _of_others(q, PEERS)
            by_teachers += tl.sum(_of_others(q * log_q, PEERS) - target * log_soft, 1)
            gradient += force * (soft - target)
        _store(gradients[0], place, gradient * share, known & is_peer[:, None])
        _store(gradients[1], place, (p_e - hit) * share, known)
    return by_ensemble, by_teachers


@triton.jit
def _soften(scanned, place, inverse, CLASSES: tl.constexpr):
    """Softmax of rows at some classes, and log softmax of them / T; both finite beyond the classes."""
    rows, top, total, log_soft = scanned
    known = (place < CLASSES)[None, :]
    z = tl.load(rows[:, None] + place[None, :], mask=known, other=0.0).to(tl.float32)
    z = tl.where(known, z - top[:, None], 0.0)
    return tl.exp(z) / total[:, None], z * inverse - log_soft[:, None]


@triton.jit
def _store(rows, place, values, known):
    at = rows[:, None] + place[None, :]
    tl.store(at, values.to(at.dtype.element_ty), mask=known)


@triton.jit
def _of_others(values, PEERS: tl.constexpr):
    """The mean over the other rows, of rows that are 0 beyond the peers."""
    return (tl.sum(values, 0, keep_dims=True) - values) / (PEERS - 1)


@triton.jit
def _sum_up(table, terms, correct, batch, TERMS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """A column of the table: the mean of a loss, or the number of right answers."""
    column = tl.program_id(0)
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, batch, BLOCK):
        sample = start + tl.arange(0, BLOCK)
        sums += tl.load(table + sample * COLUMNS + column, mask=sample < batch, other=0.0)
    if column < TERMS:
        tl.store(terms + column, tl.sum(sums) / batch)
    else:
        tl.store(correct + column - TERMS, tl.sum(sums).to(tl.int64))
