"""What no CUDA graph can hold: operations for which the host must know a value of the device."""

import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operators whose result lies on the host, or has a size that only values tell.
READS = {
    "_local_scalar_dense": "reads a number from the device",
    "item": "reads a number from the device",
    "is_nonzero": "reads a number from the device",
    "equal": "compares on the host",
    "allclose": "compares on the host",
    "nonzero": "makes a tensor whose size depends on values",
    "masked_select": "makes a tensor whose size depends on values",
    "_unique": "makes a tensor whose size depends on values",
    "_unique2": "makes a tensor whose size depends on values",
    "unique_consecutive": "makes a tensor whose size depends on values",
    "unique_dim": "makes a tensor whose size depends on values",
    "bincount": "makes a tensor whose size depends on values",
    "repeat_interleave": "makes a tensor whose size depends on values",
}
TORCH = Path(torch.__file__).parent
OWN = Path(__file__).parent


def find_obstacle(call: Callable[[], object]) -> str | None:
    """Make the call, and say in a line what in it no graph could hold; None if there is nothing."""
    with _Watch() as watch:
        call()
    return watch.found


class _Watch(TorchDispatchMode):
    """Notes the first obstacle; everything is done as ever."""

    def __init__(self) -> None:
        super().__init__()
        self.found: str | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.found is None:
            reason = _obstacle(func.overloadpacket.__name__, args, out)
            if reason is not None:
                self.found = f"{func.overloadpacket} {reason}{_where()}"
        return out


def _obstacle(name: str, args: Any, out: Any) -> str | None:
    if name in READS:
        return READS[name]
    tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
    if name in ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"):
        masks = [index for index in tensors[1:] if index.dtype in (torch.bool, torch.uint8)]
        return "picks by a mask, of as many elements as that has true values" if masks else None
    if name in ("_to_copy", "copy_", "copy"):
        places = {leaf.device.type for leaf in [*tensors, *tree_leaves(out)] if isinstance(leaf, Tensor)}
        unpinned = any(leaf.device.type == "cpu" and not leaf.is_pinned() for leaf in tensors)
        if len(places) > 1 and (unpinned or places == {"cpu"}):
            return f"copies between {' and '.join(sorted(places))}"
    return None


def _where() -> str:
    """The line that asked for it, if it is neither torch's nor of this package's steps."""
    for frame in reversed(traceback.extract_stack(sys._getframe())):  # pyright: ignore[reportPrivateUsage]
        path = Path(frame.filename)
        if TORCH not in path.parents and OWN not in path.parents:
            return f", at {path.name}:{frame.lineno}"
    return ""
