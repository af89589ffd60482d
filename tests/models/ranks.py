"""Several ranks at once: threads that add up through memory, or processes with torch.distributed."""

import multiprocessing
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

SECONDS = 30  # after which a rank gives up waiting for another

Sum = Callable[[Tensor], None]
Work = Callable[[int, Sum], Any]


def as_threads(ranks: int, work: Work) -> list[Any]:
    """What `work(rank, sum)` returns on each of so many ranks."""
    barrier = threading.Barrier(ranks)
    places: list[Tensor] = [torch.empty(0)] * ranks

    def on(rank: int) -> Any:
        def add_up(tensor: Tensor) -> None:
            places[rank] = tensor.clone()
            barrier.wait(SECONDS)
            assert len({(place.shape, place.dtype) for place in places}) == 1, "ranks add up different things"
            tensor.copy_(torch.stack(places).sum(0))
            barrier.wait(SECONDS)

        try:
            return work(rank, add_up)
        except BaseException:
            barrier.abort()  # nobody waits for a rank that has failed
            raise

    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(on, range(ranks)))


def as_processes(ranks: int, work: Work, folder: Path) -> list[Any]:
    """The same, tensors in lists and tuples, on processes that add up by gloo; `folder` is empty."""
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=_process, args=(rank, ranks, work, folder), daemon=True)
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(SECONDS)
        assert [process.exitcode for process in processes] == [0] * ranks
    finally:
        for process in processes:
            process.kill()
            process.join()
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(ranks)]


def _process(rank: int, ranks: int, work: Work, folder: Path) -> None:
    torch.set_num_threads(1)  # threads of the parent's pool are not here
    store = dist.FileStore(str(folder / "store"), ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)

    def add_up(tensor: Tensor) -> None:
        dist.all_reduce(tensor)

    torch.save(work(rank, add_up), folder / f"{rank}.pt")
    dist.destroy_process_group()
