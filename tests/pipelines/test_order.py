"""The order of an epoch is a uniform permutation, and a function of (seed, epoch)."""

import math
from collections import Counter

import pytest
import torch

from pcl_fast.errors import ConfigError
from pcl_fast.philox import Stream, philox_numpy
from pipelines.order import check_first_step, epoch_order, steps_per_epoch

CPU = torch.device("cpu")


def test_is_a_permutation() -> None:
    for num_samples in (1, 2, 7, 1000):
        order = epoch_order(num_samples, seed=3, epoch=5, device=CPU)
        assert order.dtype == torch.int64
        assert torch.equal(order.sort().values, torch.arange(num_samples))


def test_is_the_order_of_the_63_bit_keys() -> None:
    w0, w1, _, _ = philox_numpy((11, Stream.ORDER), 4, torch.arange(300).numpy(), 0, 0)
    keys = [(int(high) << 31) | (int(low) >> 1) for high, low in zip(w0, w1, strict=True)]
    assert epoch_order(300, 11, 4, CPU).tolist() == sorted(range(300), key=keys.__getitem__)


def test_depends_on_seed_and_epoch_alone() -> None:
    order = epoch_order(100, 1, 2, CPU)
    torch.manual_seed(9)
    assert torch.equal(order, epoch_order(100, 1, 2, CPU))
    assert torch.equal(order, epoch_order(100, 1, torch.tensor(2), CPU))
    for seed, epoch in ((1, 3), (2, 2), (2, 1)):
        other = epoch_order(100, seed, epoch, CPU)
        assert (order == other).sum() < 10  # of 100, one is expected to stay


def test_every_permutation_is_equally_likely() -> None:
    counts = Counter(tuple(epoch_order(4, 0, epoch, CPU).tolist()) for epoch in range(2400))
    assert len(counts) == math.factorial(4)
    chi_square = sum((count - 100) ** 2 / 100 for count in counts.values())
    assert abs(chi_square - 23) < 5 * math.sqrt(2 * 23)  # 23 degrees of freedom


def test_neighbours_are_not_kept_together() -> None:
    num_samples = 5000
    orders = torch.stack([epoch_order(num_samples, 0, epoch, CPU) for epoch in range(20)])
    followed = (orders.diff() == 1).sum()  # Poisson of mean 20: once an epoch sample i is before i + 1
    assert abs(int(followed) - 20) < 5 * math.sqrt(20)
    displacement = (orders - torch.arange(num_samples)).abs().double().mean()
    assert displacement / num_samples == pytest.approx(1 / 3, abs=0.01)


def test_steps_per_epoch() -> None:
    assert steps_per_epoch(50_000, 128, drop_last=True) == 390
    assert steps_per_epoch(50_000, 128, drop_last=False) == 391
    assert steps_per_epoch(256, 128, drop_last=True) == steps_per_epoch(256, 128, drop_last=False) == 2
    assert steps_per_epoch(5, 8, drop_last=True) == 0
    assert steps_per_epoch(5, 8, drop_last=False) == 1


def test_first_step_is_of_the_epoch() -> None:
    check_first_step(0, 3)
    check_first_step(3, 3)
    for step in (-1, 4):
        with pytest.raises(ConfigError, match=f"step {step}: it has 3 steps"):
            check_first_step(step, 3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_gives_the_same_order() -> None:
    on_gpu = epoch_order(50_000, 3, 4, torch.device("cuda"))
    assert torch.equal(on_gpu.cpu(), epoch_order(50_000, 3, 4, CPU))
