"""Memory that is used again: never while anything still refers to it."""

import gc

import torch

from pipelines.recycled import Recycler

SIZE = 1 << 20


def test_memory_is_used_again_once_nobody_refers_to_it() -> None:
    recycler = Recycler(2)
    tensor = recycler.empty(SIZE)
    address, view = tensor.data_ptr(), tensor.view(torch.float32)[4:].view(-1, 2)
    tensor.fill_(7)
    del tensor
    gc.collect()
    other = recycler.empty(SIZE)
    other.fill_(1)
    assert bool((view.view(torch.uint8) == 7).all()), "a view of it is in use"
    del view
    assert recycler.empty(SIZE).data_ptr() == address


def test_smaller_blocks_fit_and_much_smaller_ones_do_not() -> None:
    recycler = Recycler(2)
    address = recycler.empty(SIZE).data_ptr()
    assert recycler.empty(SIZE * 3 // 4).data_ptr() == address
    small = recycler.empty(SIZE // 4)
    assert small.data_ptr() != address
    assert recycler.empty(SIZE).data_ptr() == address
    assert recycler.empty(SIZE + 1).data_ptr() != address


def test_only_so_much_is_kept() -> None:
    recycler = Recycler(2)
    addresses = [tensor.data_ptr() for tensor in [recycler.empty(SIZE) for _ in range(5)]]
    again = [recycler.empty(SIZE) for _ in range(2)]
    assert {tensor.data_ptr() for tensor in again} <= set(addresses)
    assert len(recycler._free) == 0
