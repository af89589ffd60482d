"""Ranks that meet at a store which has seen others before."""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from torch.distributed import TCPStore

from pcl_fast.rendezvous import PeerLost, meet


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> TCPStore:
    """What torchrun holds, through all its restarts."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    return store


def meet_all(size: int, late: int | None = None) -> list[tuple[Any, Any]]:
    """What each of so many ranks gets, one of which comes later than the others."""
    gone = threading.Event()

    def come(rank: int) -> tuple[Any, Any]:
        if rank == late:
            gone.wait(0.3)
        return meet(rank, size, 10)

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(come, range(size)))


@pytest.mark.parametrize("late", [0, 1, 2])
def test_nothing_of_an_earlier_start_is_seen(server: TCPStore, late: int) -> None:
    """Whoever comes first, it does not take the names of those before for the others'."""
    for start in range(3):
        stores = meet_all(3, late)
        for rank, (store, another) in enumerate(stores):
            assert not store.check(["failed"]), f"start {start}"
            store.set(f"place/{rank}", str(start))
            assert another.get(f"place/{rank}").decode() == str(start)
        places = [f"place/{rank}" for rank in range(3)]
        assert all(store.check(places) for store, _ in stores), "they share one part of the store"
        stores[1][0].set("failed", "rank 1")


def test_a_start_that_was_cut_short_misleads_nobody(server: TCPStore) -> None:
    """The first rank of one start, and the second of another, had come before they were killed."""
    for rank in (0, 1):
        with pytest.raises(PeerLost, match=r"^cannot meet the others at 127\.0\.0\.1:\d+: "):
            meet(rank, 2, 0.3)
    first, second = meet_all(2, late=0)
    first[0].set("key", "value")
    assert second[0].get("key") == b"value"


def test_one_alone_meets_itself(server: TCPStore) -> None:
    ((store, another),) = meet_all(1)
    store.set("key", "value")
    assert another.get("key") == b"value"
