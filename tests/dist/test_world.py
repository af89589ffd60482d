"""What ranks agree on, with two real processes."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pcl_fast.dist import ALONE, Place, World, find_place, joined
from pcl_fast.errors import ConfigError, DataError, PclError
from tests.dist.ranks import run_ranks, started

CPU = torch.device("cpu")


def talk() -> dict[str, Any]:
    """A little of everything."""
    with joined(CPU, 60) as world:
        values = torch.tensor([1.0, 10.0], dtype=torch.float64) * (world.rank + 1)
        world.sum_(values)
        return {
            "place": (world.rank, world.size, world.is_first, world.is_joined),
            "sum": values.tolist(),
            "any": [world.any(False), world.any(world.rank == 1), world.any(True)],
            "gathered": world.gather({"rank": world.rank}),
            "shared": world.share(f"of {world.rank}"),
            "first": world.on_first(lambda: world.rank + 100),
            "all": world.on_all(lambda: world.rank + 200),
        }


def test_two_ranks_agree(tmp_path: Path) -> None:
    first, second = run_ranks(tmp_path, 2, talk)
    assert (first.pop("place"), second.pop("place")) == ((0, 2, True, True), (1, 2, False, True))
    assert (first.pop("all"), second.pop("all")) == (200, 201)
    assert first == second
    assert first == {
        "sum": [3.0, 30.0],
        "any": [False, True, True],
        "gathered": [{"rank": 0}, {"rank": 1}],
        "shared": "of 0",
        "first": 100,
    }


def test_a_group_of_one_is_a_group(tmp_path: Path) -> None:
    (only,) = run_ranks(tmp_path, 1, talk)
    assert only["place"] == (0, 1, True, True)
    assert only["sum"] == [1.0, 10.0]


def test_alone_nobody_is_asked() -> None:
    values = torch.ones(2)
    ALONE.sum_(values)
    assert values.tolist() == [1, 1]
    assert (ALONE.any(False), ALONE.any(True), ALONE.gather(3), ALONE.share(4)) == (False, True, [3], 4)
    assert not ALONE.is_joined
    with joined(CPU, 1) as world:
        assert (world.rank, world.size, world.is_joined) == (0, 1, False)
    with pytest.raises(DataError):
        ALONE.on_first(lambda: fail(DataError("no")))


def fail(error: PclError) -> None:
    raise error


def meet_errors() -> list[tuple[str, str, bool]]:
    """The errors of each rank, whoever of them met them."""
    met: list[tuple[str, str, bool]] = []

    def note(error: PclError) -> None:
        met.append((type(error).__name__, str(error), error.told_elsewhere))

    with joined(CPU, 60) as world:
        for work in (
            lambda: world.on_first(lambda: fail(DataError("of the first"))),
            lambda: world.on_all(lambda: fail(DataError(f"of {world.rank}")) if world.rank == 1 else None),
            lambda: world.agree("colour", "red" if world.rank == 0 else "blue"),
        ):
            try:
                work()
            except PclError as error:
                note(error)
        world.agree("colour", "red")
    return met


def test_an_error_of_one_is_everybodys_and_told_once(tmp_path: Path) -> None:
    first, second = run_ranks(tmp_path, 2, meet_errors)
    odd = "rank 1 has another colour than rank 0: blue instead of red"
    assert first == [
        ("DataError", "of the first", False),
        ("DataError", "of 1", True),
        ("ConfigError", odd, False),
    ]
    assert second == [
        ("DataError", "of the first", True),
        ("DataError", "of 1", False),
        ("ConfigError", odd, True),
    ]


def leave_early() -> None:
    """The second rank goes, the first waits for it."""
    with joined(CPU, 60) as world:
        if world.rank == 1:
            raise ValueError("a fault\nof some kind")
        world.sum_(torch.ones(1))


def test_a_rank_that_fails_takes_the_others_along(tmp_path: Path) -> None:
    with started(tmp_path, 2, leave_early) as ranks:
        first, second = ranks.wait(20)
    assert (first.code, second.code) == (1, 1)
    assert "PeerLost: lost another rank in the beginning: rank 1: ValueError: a fault" in first.err
    assert "pcl-fast: rank 1 fails in the beginning" in second.err
    assert second.err.rstrip().endswith("of some kind")


def place(monkeypatch: pytest.MonkeyPatch, **given: str) -> Place:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    return find_place()


def test_torchrun_says_who_is_who(monkeypatch: pytest.MonkeyPatch) -> None:
    assert place(monkeypatch) == Place(0, 1, 0, 1)
    assert place(monkeypatch, RANK="3") == Place()
    full = place(monkeypatch, RANK="9", WORLD_SIZE="16", LOCAL_RANK="1", LOCAL_WORLD_SIZE="8")
    assert full == Place(9, 16, 1, 8)
    assert not full.is_first
    assert place(monkeypatch, RANK="1", WORLD_SIZE="2") == Place(1, 2, 1, 2)
    with pytest.raises(ConfigError, match=r"^RANK=one, WORLD_SIZE=2: not numbers; start .* torchrun$"):
        place(monkeypatch, RANK="one", WORLD_SIZE="2")
    with pytest.raises(ConfigError, match=r"^RANK=2: of WORLD_SIZE=2"):
        place(monkeypatch, RANK="2", WORLD_SIZE="2")


def test_a_world_of_one_needs_no_watchdog() -> None:
    World().enter("anything", 3)
    assert World(Place(1, 4)).rank == 1
