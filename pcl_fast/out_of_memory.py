"""What to do about a step that does not fit into memory."""

import contextlib
from collections.abc import Generator

import torch

from pcl_fast.config import Config
from pcl_fast.errors import PclError
from pcl_fast.kernels.sgd_ema import FlatBuffers
from pcl_fast.objectives import make_objective

MIB = 2**20


@contextlib.contextmanager
def advising(config: Config, weights: FlatBuffers) -> Generator[None]:
    """Turn running out of memory into a PclError that says what takes it, and how much a batch may have."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise PclError(advice(config, weights, error)) from None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch has asked for more than there is, on a GPU or on the CPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)


def advice(config: Config, weights: FlatBuffers, error: BaseException) -> str:
    """One line: what did not fit, what takes the memory, and what to give instead."""
    batch, views = config.train.batch_size, make_objective(config).num_views
    held = sum(buffer.numel() * buffer.element_size() for _, buffer in weights.named())
    first = str(error).strip().split("\n")[0].rstrip(".")
    device = torch.device(config.device)
    parts = [f"weights, momentum and averages take {held / MIB:,.0f} MiB"]
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) - held
        each = peak / batch / views
        parts.append(f"{batch} images x {views} views over {peak / MIB:,.0f}, {each / MIB:.1f} a view")
    half = max(1, batch // 2)
    return (
        f"out of memory on {config.device} ({first}): {'; '.join(parts)}. Give --train.batch-size {half} "
        f"(and --optim.lr {config.optim.lr / 2:g} with it), train on twice as many ranks, or leave out a peer"
    )
