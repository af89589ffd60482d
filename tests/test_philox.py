"""Philox against the published vectors, against itself in numpy, and against Triton's."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pcl_fast.philox import below_torch, philox_numpy, philox_torch, uniform_numpy, uniform_torch

FULL = 0xFFFFFFFF
# The known answers of Random123 for philox4x32-10: counter, key, words.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((FULL, FULL, FULL, FULL), (FULL, FULL), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]

TRITON_PROGRAM = """
import torch, triton, triton.language as tl
from pcl_fast.philox import philox_torch

@triton.jit
def draw(words, counters, seed, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    c0, c1 = tl.load(counters + at), tl.load(counters + COUNT + at)
    c2, c3 = tl.load(counters + 2 * COUNT + at), tl.load(counters + 3 * COUNT + at)
    w0, w1, w2, w3 = tl.philox(seed, c0, c1, c2, c3)
    tl.store(words + at, w0.to(tl.int64))
    tl.store(words + COUNT + at, w1.to(tl.int64))
    tl.store(words + 2 * COUNT + at, w2.to(tl.int64))
    tl.store(words + 3 * COUNT + at, w3.to(tl.int64))

counters = torch.randint(0, 2**32, (4, 64), generator=torch.Generator().manual_seed(0))
for key in [(0, 0), (1, 0), (0, 1), (0xDEADBEEF, 0x7FFFFFFF), (7, 0x80000001)]:
    words = torch.zeros(4, 64, dtype=torch.int64)
    seed = key[0] | key[1] << 32
    seed -= (seed >> 63) << 64
    draw[(1,)](words, counters.to(torch.uint32), seed, COUNT=64)
    assert torch.equal(words, torch.stack(philox_torch(key, *counters))), key
print("the same")
"""


def random_counters(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 2**32, (4, count))


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, int], words: tuple[int, ...]) -> None:
    c0, c1, c2, c3 = (torch.tensor([c]) for c in counter)
    assert tuple(int(w) for w in philox_torch(key, c0, c1, c2, c3)) == words
    assert tuple(int(w) for w in philox_numpy(key, *counter)) == words


def test_torch_and_numpy_agree_bitwise() -> None:
    counters = random_counters(5000)
    for key in [(0, 0), (FULL, 1), (123456789, FULL)]:
        ours = torch.stack(philox_torch(key, *torch.from_numpy(counters)))
        assert ours.dtype == torch.int64
        np.testing.assert_array_equal(ours.numpy().astype(np.uint64), np.stack(philox_numpy(key, *counters)))


def test_counters_broadcast_and_may_be_integers() -> None:
    rows, columns = torch.arange(3).unsqueeze(1), torch.arange(5)
    mixed = torch.stack(philox_torch((1, 2), 7, columns, rows, 9))
    assert mixed.shape == (4, 3, 5)
    for row in range(3):
        for column in range(5):
            assert mixed[:, row, column].tolist() == [int(w) for w in philox_numpy((1, 2), 7, column, row, 9)]


def test_counters_are_taken_modulo_two_to_the_32() -> None:
    counter = torch.tensor([5, 6])
    plain = torch.stack(philox_torch((1, 2), counter, counter, counter, 3))
    wrapped = torch.stack(philox_torch((1, 2), counter - 2**32, counter + 2**32, counter, 3 + 2**32))
    assert torch.equal(plain, wrapped)


def test_uniform_is_exact_and_below_one() -> None:
    words = torch.tensor([0, 255, 256, 2**31, FULL])
    expected = torch.tensor([0.0, 0.0, 2.0**-24, 0.5, 1 - 2.0**-24])
    assert uniform_torch(words).dtype == torch.float32
    assert torch.equal(uniform_torch(words), expected)
    np.testing.assert_array_equal(uniform_numpy(words.numpy().astype(np.uint64)), expected.numpy())


def test_uniform_has_the_moments_of_a_uniform() -> None:
    draws = uniform_torch(torch.stack(philox_torch((3, 0), torch.arange(50_000), 0, 0, 0))).double()
    count = draws.numel()
    assert abs(draws.mean() - 1 / 2) < 5 * (1 / 12 / count) ** 0.5
    assert abs((draws**2).mean() - 1 / 3) < 5 * (4 / 45 / count) ** 0.5
    # Words of one counter, and words of neighbouring counters, are uncorrelated.
    assert torch.corrcoef(draws).triu(1).abs().max() < 5 / 50_000**0.5
    assert torch.corrcoef(torch.stack((draws[0, 1:], draws[0, :-1])))[0, 1].abs() < 5 / 50_000**0.5


def test_below_covers_its_range_evenly() -> None:
    edges = torch.tensor([0, FULL])
    assert below_torch(edges, 9).tolist() == [0, 8]
    assert below_torch(edges, 2**31 - 1).tolist() == [0, 2**31 - 2]
    counts = below_torch(philox_torch((3, 0), torch.arange(90_000), 0, 0, 0)[0], 9).bincount().double()
    chi_square = ((counts - 10_000) ** 2 / 10_000).sum()  # 8 degrees of freedom: mean 8, deviation 4
    assert chi_square < 8 + 5 * 4


def test_triton_draws_the_same_words(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    program = tmp_path / "draw.py"  # Triton reads a kernel's source from its file
    program.write_text(TRITON_PROGRAM)
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": str(Path(__file__).resolve().parents[1]),
    }
    run = subprocess.run(
        [sys.executable, program], env=environment, capture_output=True, text=True, timeout=50, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout == "the same\n"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_draws_the_same_words() -> None:
    counters = torch.from_numpy(random_counters(5000))
    on_cpu = torch.stack(philox_torch((FULL, 1), *counters))
    on_gpu = torch.stack(philox_torch((FULL, 1), *counters.cuda()))
    assert torch.equal(on_gpu.cpu(), on_cpu)
