"""Random numbers that are a function of what they are for: Philox4x32-10, a counter-based generator.

Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011. A key and a
counter give four independent 32-bit words; nothing is remembered between calls, so a draw does not
depend on what was drawn before, on the batch it is drawn with, or on the worker that draws it.

The convention here: key `(seed, stream)`, counter `(epoch, sample, view, draw)`. The words are those
of Random123, cuRAND and Triton's `tl.philox` with the seed `seed | stream << 32`.
"""

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, float32, full, int64

WORD_MASK = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)  # golden ratio and sqrt(3) - 1
ROUNDS = 10

Key = tuple[int, int]
TorchWords = tuple[Tensor, Tensor, Tensor, Tensor]
NumpyWords = tuple[NDArray[np.uint64], NDArray[np.uint64], NDArray[np.uint64], NDArray[np.uint64]]


class Stream(IntEnum):
    """The second word of the key: what the numbers are drawn for. A value is never used twice."""

    ORDER = 0
    AUGMENT = 1
    DROPOUT = 2
    HELD_OUT = 3
    MIXUP = 4
    CUTOUT = 5


def philox_torch(
    key: Key, c0: Tensor | int, c1: Tensor | int, c2: Tensor | int, c3: Tensor | int
) -> TorchWords:
    """Four random words for each counter, on the device of the counters.

    Counters are int64 tensors that broadcast together, or plain integers, and are taken modulo 2^32.
    Returns four int64 tensors of the broadcast shape with values in [0, 2^32). Never synchronises.
    """
    tensors = (c for c in (c0, c1, c2, c3) if isinstance(c, Tensor))
    device = next((c.device for c in tensors), None)
    c0, c1, c2, c3 = (
        c & WORD_MASK if isinstance(c, Tensor) else full((), c & WORD_MASK, dtype=int64, device=device)
        for c in (c0, c1, c2, c3)
    )
    for number in range(ROUNDS):
        k0, k1 = _round_key(key, number)
        # The 64-bit products wrap to negative int64s; their bits are right, and one mask after the
        # xors drops the sign that the shift drags in as well as the high half of c1 and c3.
        product0, product1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1 = ((product1 >> 32) ^ c1 ^ k0) & WORD_MASK, product1
        c2, c3 = ((product0 >> 32) ^ c3 ^ k1) & WORD_MASK, product0
    return c0, c1 & WORD_MASK, c2, c3 & WORD_MASK


def philox_numpy(key: Key, *counter: NDArray[np.integer] | int) -> NumpyWords:
    """The words of `philox_torch` as uint64 arrays; `counter` is four arrays or integers."""
    mask, shift = np.uint64(WORD_MASK), np.uint64(32)
    c0, c1, c2, c3 = np.broadcast_arrays(*(np.asarray(c).astype(np.uint64) & mask for c in counter))
    for number in range(ROUNDS):
        k0, k1 = (np.uint64(k) for k in _round_key(key, number))
        product0, product1 = c0 * np.uint64(MULTIPLIERS[0]), c2 * np.uint64(MULTIPLIERS[1])
        c0, c1 = (product1 >> shift) ^ c1 ^ k0, product1 & mask
        c2, c3 = (product0 >> shift) ^ c3 ^ k1, product0 & mask
    return c0, c1, c2, c3


def uniform_torch(words: Tensor) -> Tensor:
    """Words to float32 in [0, 1): the multiples of 2^-24, all equally likely."""
    return (words >> 8).to(float32) * 2.0**-24


def uniform_numpy(words: NDArray[np.uint64]) -> NDArray[np.float32]:
    """Words to float32 in [0, 1): the multiples of 2^-24, all equally likely."""
    return (words >> np.uint64(8)).astype(np.float32) * np.float32(2.0**-24)


def below_torch(words: Tensor, bound: int) -> Tensor:
    """Words to int64 in [0, bound), for 1 <= bound < 2^31; no value is off by more than 2^-32."""
    return (words * bound) >> 32


def _round_key(key: Key, number: int) -> Key:
    return (key[0] + number * KEY_STEPS[0]) & WORD_MASK, (key[1] + number * KEY_STEPS[1]) & WORD_MASK
