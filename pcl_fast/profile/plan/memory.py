"""What a step keeps in a GPU's memory: weights exactly, activations as a least."""

from collections.abc import Iterable

from pcl_fast.models.operations import Operation
from pcl_fast.profile.roofline import StepWork
from pcl_fast.profile.traffic import FLOAT32

# Largest maps that come and go beside what is kept: two of gradients, two of the mean teachers.
PASSING = 4


def weight_bytes(work: StepWork, travelling: int) -> int:
    """Weights, gradients, momentum, averages in float32, their narrow copies, and gradients that travel.

    And those of a trained teacher. `travelling`: bytes of each travelling gradient, 0 if they travel as they
    are. What aligns each weight to 256 bytes
    is left out.
    """
    averaged, copies = work.teacher != "none", work.width < FLOAT32
    each = FLOAT32 * (3 + averaged) + work.width * copies * (1 + averaged) + travelling
    return each * work.parameters + FLOAT32 * sum(one.parameters for one in work.network.trained_teacher)


def activation_bytes(work: StepWork) -> int:
    """The least that a step keeps for its backward pass: the views, and each kernel's result.

    Workspaces of libraries, and what the allocator does not give back, come on top.
    """
    trunk, branches = work.network.trunk, work.network.of_peers(work.num_peers)
    of_image = work.num_views * (_views(work) + _kept(trunk))
    of_image += sum(times * _kept((each,)) for each, times in branches)
    of_image += _kept(work.over_all)
    # one of all views of a shared trunk, or of one peer
    largest = max(work.num_views * _largest(trunk), _largest(each for each, _ in branches))
    return work.batch_size * work.width * (of_image + PASSING * largest)


def _kept(operations: Iterable[Operation]) -> int:
    """Elements that kernels write; what rides on a neighbour is not written by itself."""
    return sum(each.written for each in operations if each.kind != "fork" and not each.rides)


def _largest(operations: Iterable[Operation]) -> int:
    return max((each.written for each in operations), default=0)


def _views(work: StepWork) -> int:
    """Elements of a view: what the first layer reads."""
    return (*work.network.trunk, *work.network.branch)[0].read
