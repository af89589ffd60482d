"""A step on a CUDA device that is only pretended: no tensor of the host takes part in it.

Tensors without values, which know their device, run through every operation; autograd's engine alone wants
a driver. So what a graph would freeze or refuse, a number fetched from the host, shows without a GPU.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import pipelines.resident
from pcl_fast import build
from pcl_fast.kernels import bookkeeping, pcl_loss, sgd_ema
from pcl_fast.metrics import RunningMeans
from pcl_fast.models.peers import PeerNetwork
from pcl_fast.step.arena import Arena
from pcl_fast.step.device_step import DeviceStep
from pcl_fast.step.feed import make_feed
from pcl_fast.step.obstacles import find_obstacle
from pcl_fast.step.timetable import Timetable
from pcl_fast.streams import Fork
from pipelines.augment import NORMALISATIONS
from pipelines.resident import ResidentTrainLoader, TrainOptions
from tests.step.tiny import BATCH, CLASSES, SIZE, tiny_config

CUDA = torch.device("cuda:0")
METHODS: list[dict[str, Any]] = [
    {},
    {"dtype": "float32", "num_peers": 3},
    {"ema_bn": "copy", "view_per_peer": False, "trunk_views": "loop"},
    {"ema_bn": "ema", "num_peers": 1},
    {"detach_ensemble": False, "bn_views": "joint"},
    {"mutual_learning": True},
    {"method": "vanilla"},
]


class Places(TorchDispatchMode):
    """Notes the operations in which a tensor lies elsewhere than on the device."""

    def __init__(self) -> None:
        super().__init__()
        self.strays: list[str] = []
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Fused SGD writes in place and says nothing: without values there is nothing to do.
        known = func.overloadpacket is not torch.ops.aten._fused_sgd_
        out = func(*args, **(kwargs or {})) if known else None
        tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)]
        self.operations += 1
        if any(tensor.device != CUDA for tensor in tensors):
            self.strays.append(str(func))
        return out


def strays_of(call: Callable[[], object]) -> list[str]:
    with Places() as places:
        call()
    assert places.operations > 3, "it saw nothing"
    return places.strays


def pretend_to_differentiate(arena: Arena, roots: Sequence[Tensor], seeds: Sequence[Tensor | None]) -> None:
    """Every gradient depends on every root, on no value of the host."""
    total = torch.stack(
        [root.sum() if seed is None else (root * seed).sum() for root, seed in zip(roots, seeds, strict=True)]
    ).sum()
    arena.buffers.gradients.copy_(total.detach().expand_as(arena.buffers.gradients))


def copied(network: PeerNetwork, memo: dict[int, Any]) -> PeerNetwork:
    """What `deepcopy` makes, with new tensors in the place of copies of what has no values."""
    for tensor in [*network.parameters(), *network.buffers()]:
        twin = torch.empty_like(tensor)
        memo[id(tensor)] = nn.Parameter(twin) if isinstance(tensor, nn.Parameter) else twin
    made = memo[id(network)] = PeerNetwork.__new__(PeerNetwork)
    vars(made).update(copy.deepcopy(vars(network), memo))
    return made


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Within it tensors are made on a CUDA device that is not there."""
    for owner, name, value in (
        (build, "prepare_backend", lambda config: None),
        (build, "_fork", lambda config, tasks: Fork(torch.device("cpu"), 0)),
        (bookkeeping, "has_triton", lambda: False),  # kernels of Triton would be launched
        (pcl_loss, "has_triton", lambda: False),
        (sgd_ema, "has_triton", lambda: False),
        (pipelines.resident, "has_triton", lambda: False),
        (pipelines.resident, "check_data", lambda *inputs: None),  # looks at values, before a run
        (torch.cuda, "is_bf16_supported", lambda **options: True),
        (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
        (Arena, "differentiate", pretend_to_differentiate),
        (PeerNetwork, "to", lambda network, *args, **kwargs: network),  # it is there
    ):
        monkeypatch.setattr(owner, name, value)
    monkeypatch.setattr(PeerNetwork, "__deepcopy__", copied, raising=False)
    with FakeTensorMode(), torch.device(CUDA):
        yield


def make_step(method: str = "pcl", dtype: str = "bfloat16", **pcl: Any) -> DeviceStep:
    """A step with its loader and its schedules, all of it on the pretended device."""
    usual: dict[str, Any] = {"num_peers": 2}
    config = tiny_config(dtype, **(usual | pcl))
    changes: dict[str, Any] = {"method": method, "device": str(CUDA), "channels_last": "on", "kernels": "off"}
    config = dataclasses.replace(config, **changes)
    state = build.build_state(config)
    options = TrainOptions(
        batch_size=BATCH,
        num_classes=CLASSES,
        normalisation=NORMALISATIONS["cifar10"],
        device=CUDA,
        channels_last=True,
        num_views=state.objective.num_views,
        seed=3,
        drop_last=True,
    )
    images = torch.zeros(3 * BATCH, 3, SIZE, SIZE, dtype=torch.uint8)
    loader = ResidentTrainLoader(images, torch.zeros(3 * BATCH, dtype=torch.int64), options)
    width = len(state.guard.names) + state.objective.num_peers + state.objective.has_ensemble
    means = RunningMeans(width, CUDA), RunningMeans(width, CUDA)
    feed = make_feed(loader, lambda batch: None, fixed=True)
    feed.begin(0, 0)
    return DeviceStep(state, feed, Timetable(config, loader.steps_per_epoch, CUDA), means)


@pytest.mark.usefixtures("fake_cuda")
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_batch_schedules_forward_loss_update_and_sums_stay_on_the_device(method: dict[str, Any]) -> None:
    step = make_step(**method)
    assert bool(step.state.arena.student_half) == ("dtype" not in method)
    strays: list[str] = []
    assert find_obstacle(lambda: strays.extend(strays_of(step))) is None
    assert strays == []


@pytest.mark.usefixtures("fake_cuda")
@pytest.mark.parametrize(
    ("number", "said"),
    [
        (lambda: torch.ones((), device="cpu"), "aten.mul.Tensor"),
        (lambda: torch.ones((), device="cpu").to(CUDA), "aten._to_copy.default"),
    ],
    ids=["used", "fetched"],
)
def test_a_number_of_the_host_shows(number: Callable[[], Tensor], said: str) -> None:
    """The control: neither is an error, both would stay in a graph as they were when it was made."""
    step = make_step()
    forward = step.state.student_forward
    step.state.student_forward = lambda views_VBCHW: forward(views_VBCHW * number())
    assert said in strays_of(step)


@pytest.mark.usefixtures("fake_cuda")
def test_a_number_of_the_device_cannot_be_asked_for() -> None:
    step = make_step()
    objective: Any = step.state.objective
    loss = objective.loss
    asking: Any = lambda *inputs: loss(*inputs[:-1], torch.tensor(float(inputs[-1])))  # noqa: E731
    objective.loss = asking
    with pytest.raises(DataDependentOutputException, match="_local_scalar_dense"):
        step()
