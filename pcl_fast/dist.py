"""Several processes that train together, a device each: who they are, and what they agree on.

torchrun starts them and tells them their ranks; torch.distributed carries what they say to each other: NCCL
between GPUs, gloo on the CPU and for what hosts agree on.
"""

import contextlib
import datetime
import os
import sys
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as torch_dist
from torch import Tensor

from pcl_fast.errors import ConfigError, PclError
from pcl_fast.rendezvous import PeerLost, meet
from pcl_fast.signals import StopSignal
from pcl_fast.watchdog import Watchdog

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Place:
    """A process among `size` that torchrun has started, `local_size` of them on this machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether it speaks and writes for all."""
        return self.rank == 0


def find_place() -> Place:
    """This process's place, from what torchrun has put into the environment; the only one without it.

    ConfigError if the environment says only half of it.
    """
    names = {
        "rank": "RANK",
        "size": "WORLD_SIZE",
        "local_rank": "LOCAL_RANK",
        "local_size": "LOCAL_WORLD_SIZE",
    }
    given = {field: os.environ[name] for field, name in names.items() if name in os.environ}
    if "rank" not in given or "size" not in given:
        return Place()
    try:
        numbers = {field: int(value) for field, value in given.items()}
    except ValueError:
        listed = ", ".join(f"{names[field]}={value}" for field, value in given.items())
        raise ConfigError(f"{listed}: not numbers; start several ranks with torchrun") from None
    numbers = {"local_rank": numbers["rank"], "local_size": numbers["size"]} | numbers
    if not 0 <= numbers["rank"] < numbers["size"]:
        raise ConfigError(
            f"RANK={numbers['rank']}: of WORLD_SIZE={numbers['size']}; start ranks with torchrun"
        )
    return Place(**numbers)


class World:
    """All ranks together, as one of them sees it; a process alone is a world of one.

    What is called here must be called by every rank, in the same order. PeerLost is raised if another rank
    is gone.
    """

    def __init__(self, place: Place | None = None, watchdog: Watchdog | None = None) -> None:
        place = place or Place()
        self.rank, self.size, self.is_first = place.rank, place.size, place.is_first
        self._watchdog = watchdog

    @property
    def is_joined(self) -> bool:
        """Whether there is anybody to talk to, be it over a group of one."""
        return self._watchdog is not None

    def pass_on(self, stop: StopSignal) -> None:
        """Let what `stop` receives on one rank reach that of every rank, within a second."""
        if self._watchdog is not None:
            self._watchdog.stop = stop

    def enter(self, phase: str, step: int) -> None:
        """Note what this rank does from now on, which also says that it lives; `step` counts from 1."""
        if self._watchdog is not None:
            self._watchdog.enter(phase, step)

    def sum_(self, tensor: Tensor) -> None:
        """Add a tensor up over all ranks, in place, where it lies; a CUDA graph can hold it."""
        if self.is_joined:
            with self.together():
                torch_dist.all_reduce(tensor)

    def any(self, flag: bool) -> bool:
        """Whether it is so on any rank."""
        if not self.is_joined:
            return flag
        total = torch.tensor(int(flag))
        with self.together():
            torch_dist.all_reduce(total)
        return bool(total)

    def gather(self, value: Result) -> list[Result]:
        """What each rank has, by rank; picklable."""
        if not self.is_joined:
            return [value]
        found: list[Any] = [None] * self.size
        with self.together():
            torch_dist.all_gather_object(found, value)
        return found

    def share(self, value: Result) -> Result:
        """What the first rank has; picklable."""
        if not self.is_joined:
            return value
        box: list[Any] = [value if self.is_first else None]
        with self.together():
            torch_dist.broadcast_object_list(box, src=0)
        return box[0]

    def on_first(self, work: Callable[[], Result]) -> Result:
        """Have the first rank do something, and every rank its result; or raise the PclError that it met."""
        result, error = None, None
        if self.is_first:
            result, error = _tried(work)
        result, error = self.share((result, error))
        if error is not None:
            error.told_elsewhere = not self.is_first
            raise error
        return result  # pyright: ignore[reportReturnType]

    def on_all(self, work: Callable[[], Result]) -> Result:
        """Do something on every rank; if any meets a PclError, all raise one, and one tells it."""
        result, error = _tried(work)
        errors = self.gather(error)
        ranks = [rank for rank, met in enumerate(errors) if met is not None]
        if ranks:
            error = error or errors[ranks[0]]
            assert error is not None
            error.told_elsewhere = self.rank != ranks[0]
            raise error
        return result  # pyright: ignore[reportReturnType]

    def agree(self, what: str, value: object) -> None:
        """ConfigError on all ranks unless `value` is the same on all; `what` names it."""
        values = self.gather(value)
        for rank, other in enumerate(values):
            if other != values[0]:
                error = ConfigError(
                    f"rank {rank} has another {what} than rank 0: {other} instead of {values[0]}"
                )
                error.told_elsewhere = not self.is_first
                raise error

    @contextlib.contextmanager
    def together(self) -> Generator[None]:
        """Around what needs all ranks: an error of torch's here means that one of them is gone."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            assert self._watchdog is not None
            raise PeerLost(self._watchdog.explain_loss(error)) from None


ALONE = World()


def _tried(work: Callable[[], Result]) -> tuple[Result | None, PclError | None]:
    try:
        return work(), None
    except PclError as error:
        return None, error


@contextlib.contextmanager
def joined(device: torch.device, timeout: float) -> Generator[World]:
    """All ranks that torchrun has started, from here to the end of the block; a world of one without it.

    A rank that makes no progress for `timeout` seconds ends itself, with a line that says where all ranks
    are. One that leaves the block by an exception takes the others along.
    """
    place = find_place()
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield World()
        return
    limit = datetime.timedelta(seconds=timeout + 60)  # later than the watchdog, who says more
    backend = "gloo"
    if device.type == "cuda":
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
    store, another = meet(place.rank, place.size, timeout)
    watchdog = Watchdog(another, place.rank, place.size, timeout)
    watchdog.start()
    world = World(place, watchdog)
    try:
        with world.together():
            torch_dist.init_process_group(
                backend, store=store, rank=place.rank, world_size=place.size, timeout=limit
            )
        yield world
        with world.together():
            torch_dist.barrier()  # nobody takes the others' leaving for a failure
        torch_dist.destroy_process_group()
    except BaseException as error:
        if not isinstance(error, (PclError, SystemExit, KeyboardInterrupt)):
            sys.stderr.write(f"pcl-fast: rank {place.rank} fails in {watchdog.place}:\n")
        watchdog.tell_failure(error)
        raise
    finally:
        watchdog.close()
