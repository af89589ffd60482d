"""Where ranks meet: a store of keys and values that torchrun holds, or the first rank without it."""

import os
import time
import uuid
from datetime import timedelta

import torch.distributed as torch_dist
from torch.distributed import PrefixStore, Store

from pcl_fast.errors import PclError

INTERVAL = 0.05  # seconds between two looks
ROUND = "pcl_fast/round"


class PeerLost(PclError):
    """Another rank has failed or is gone, and this one cannot go on without it."""


def meet(rank: int, size: int, timeout: float) -> tuple[Store, Store]:
    """Two connections to what all ranks of this start share, one for each thread; PeerLost if not all come.

    torchrun keeps its store when it starts ranks again: nothing of an earlier start is found in what is
    returned.
    """
    limit = timedelta(seconds=timeout)
    try:
        store = next(torch_dist.rendezvous("env://", rank=rank, world_size=size, timeout=limit))[0]
        name = _open_round(store, size, timeout) if rank == 0 else _join_round(store, rank, timeout)
        store.set_timeout(limit + timedelta(seconds=60))  # later than the watchdog, who says more
        return PrefixStore(name, store), PrefixStore(name, store.clone())
    except torch_dist.DistError as error:
        raise _lost(size, str(error).strip().split("\n")[0]) from None
    except TimeoutError as error:
        raise _lost(size, str(error)) from None


def _open_round(store: Store, size: int, timeout: float) -> str:
    """Name a round; everybody who answers to this name lives now, and is told so."""
    name = uuid.uuid4().hex
    answers = [_answer(name, rank) for rank in range(1, size)]
    store.set(ROUND, name)
    deadline = time.monotonic() + timeout
    while answers and not store.check(answers):
        if time.monotonic() > deadline:
            missing = [str(rank) for rank in range(1, size) if not store.check([_answer(name, rank)])]
            raise TimeoutError(f"rank {', '.join(missing)} has not come within {timeout:g} s")
        time.sleep(INTERVAL)
    store.set(f"{name}/all", " ".join(store.get(answer).decode() for answer in answers))
    return name


def _join_round(store: Store, rank: int, timeout: float) -> str:
    """Answer to the newest name until this very answer is confirmed: an older round's first rank is gone."""
    own = uuid.uuid4().hex
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if store.check([ROUND]):
            name = store.get(ROUND).decode()
            store.set(_answer(name, rank), own)
            if store.check([f"{name}/all"]) and own in store.get(f"{name}/all").decode().split():
                return name
        time.sleep(INTERVAL)
    raise TimeoutError(f"not all have come within {timeout:g} s")


def _answer(name: str, rank: int) -> str:
    return f"{name}/{rank}"


def _lost(size: int, reason: str) -> PeerLost:
    where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    return PeerLost(f"cannot meet the others at {where}: {reason}; start all {size} ranks with torchrun")
