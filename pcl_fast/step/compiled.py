"""A function through torch.compile, or as it is where that fails."""

from collections.abc import Callable
from typing import Generic, ParamSpec, TypeVar

import torch
from torch._dynamo.exc import TorchDynamoException

from pcl_fast.step.capture import first_line

Inputs = ParamSpec("Inputs")
Output = TypeVar("Output")
Say = Callable[[str], None]


class Compiled(Generic[Inputs, Output]):
    """Compiled on the first call; `say` is told if it cannot be, and from then on it runs as it is."""

    def __init__(self, function: Callable[Inputs, Output], say: Say) -> None:
        self._plain, self._say = function, say
        # The default mode: Inductor's own CUDA graphs would be in the way of the step's.
        self._compiled: Callable[Inputs, Output] | None = torch.compile(function)

    def __call__(self, *args: Inputs.args, **kwargs: Inputs.kwargs) -> Output:
        """Call the function."""
        if self._compiled is not None:
            try:
                return self._compiled(*args, **kwargs)
            except TorchDynamoException as error:
                self._compiled = None
                self._say(f"the network cannot be compiled ({first_line(error)}); it runs eager")
        return self._plain(*args, **kwargs)
