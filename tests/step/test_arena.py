"""Weights in flat buffers: ordinary to look at, and updated as by torch's own optimizer."""

import copy
import dataclasses
import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from pcl_fast.kernels.sgd_ema import SgdRule
from pcl_fast.models.peers import PeerNetwork
from pcl_fast.models.zoo import find_backbone
from pcl_fast.step.arena import Arena
from pcl_fast.step.mean_teacher import MeanTeacher
from tests.step.tiny import CLASSES, SIZE, equal, parameters

RULE = SgdRule(momentum=0.9, weight_decay=5e-3, nesterov=True)
RULES = [
    RULE,
    dataclasses.replace(RULE, nesterov=False),
    dataclasses.replace(RULE, momentum=0.0, nesterov=False),
]
GO = torch.zeros(())
LAST = torch.channels_last


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def make_network(layout: torch.memory_format = torch.contiguous_format) -> PeerNetwork:
    network = PeerNetwork(find_backbone("resnet8"), CLASSES, num_peers=2)
    return network.to(memory_format=layout)  # pyright: ignore[reportCallIssue]


def loss_of(network: nn.Module) -> Tensor:
    """Some loss of every weight, of the same noise every time."""
    draws = torch.Generator().manual_seed(5)
    kind = next(network.parameters()).dtype
    out = network(torch.randn(2, 4, 3, SIZE, SIZE, generator=draws).to(kind))
    return out.logits_VBC.square().mean() + out.ensemble_logits_BC.sin().mean()


def places(flat: Tensor, views: Iterator[Tensor]) -> list[tuple[int, int]]:
    """The bytes that each view takes in a flat buffer: first, and first after it."""
    found: list[tuple[int, int]] = []
    for view in views:
        begin = view.data_ptr() - flat.data_ptr()
        extent = 1 + sum((n - 1) * step for n, step in zip(view.shape, view.stride(), strict=True))
        assert extent == view.numel(), "a view has gaps"
        found.append((begin, begin + extent * view.element_size()))
    return sorted(found)


@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST], ids=str)
def test_everything_lies_in_one_buffer_of_its_kind_aligned_and_apart(layout: torch.memory_format) -> None:
    network = make_network(layout)
    before, strides = parameters(network), {n: p.stride() for n, p in network.named_parameters()}
    teacher = MeanTeacher(network, "own").network
    with torch.no_grad():
        next(teacher.parameters()).add_(1)  # an average that is not the weight
    averages = parameters(teacher)
    arena = Arena(network, teacher, RULE, torch.bfloat16)
    flat = arena.buffers
    assert equal(parameters(network), before)
    assert equal(parameters(teacher), averages)
    gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    held = [
        (flat.values, dict(network.named_parameters())),
        (flat.gradients, gradients),
        (flat.momentum, dict(arena.momentum)),
        (flat.averages, dict(teacher.named_parameters())),
        (flat.half_values, arena.student_half),
        (flat.half_averages, arena.teacher_half),
    ]
    for buffer, views in held:
        assert buffer is not None
        found = places(buffer, iter(views.values()))
        assert [begin % 128 for begin, _ in found] == [0] * len(views)
        assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(found)), "two overlap"
        assert found[-1][1] <= buffer.numel() * buffer.element_size()
        assert {name: view.stride() for name, view in views.items()} == {n: strides[n] for n in views}
    assert len({buffer.data_ptr() for _, buffer in flat.named()}) == 6
    assert [len(views) for _, views in held[:4]] == [len(before)] * 4
    assert "trunk.stem.0.weight" in arena.student_half


@pytest.mark.parametrize("rule", RULES, ids=["nesterov", "heavy ball", "plain"])
def test_three_steps_are_those_of_torchs_sgd_and_of_averages_by_hand(rule: SgdRule) -> None:
    network = make_network().double()
    twin = copy.deepcopy(network)
    averages = parameters(twin)
    optimizer = torch.optim.SGD(twin.parameters(), lr=1.0, foreach=True, **dataclasses.asdict(rule))
    teacher = MeanTeacher(network, "own").network
    arena = Arena(network, teacher, rule)
    for lr, phi in ((0.1, 0.0), (0.05, 0.5), (0.01, 2 / 3)):
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        loss_of(twin).backward()
        optimizer.step()
        averages = {n: phi * averages[n] + (1 - phi) * p.detach() for n, p in twin.named_parameters()}
        arena.differentiate([loss_of(network)], [None])
        for name, parameter in twin.named_parameters():
            ours = network.get_parameter(name)
            torch.testing.assert_close(ours.grad, parameter.grad, rtol=1e-11, atol=1e-13)
        arena.update(scalar(lr), scalar(phi), GO)
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(network.get_parameter(name), parameter, rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(teacher.get_parameter(name), averages[name], rtol=1e-11, atol=1e-13)
        if rule.momentum:
            expected = optimizer.state[parameter]["momentum_buffer"]
            torch.testing.assert_close(arena.momentum[name], expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("rule", RULES, ids=["nesterov", "heavy ball", "plain"])
def test_some_parts_decay_as_in_groups_of_torchs_sgd(rule: SgdRule) -> None:
    """More, less and not at all; only what lies under the name, not what begins like it; averages follow."""
    names, draws = ("head", "header", "tail", "body"), torch.Generator().manual_seed(2)
    network = nn.ModuleDict({name: nn.Linear(3, 2).double() for name in names})
    twin, decays = copy.deepcopy(network), {"head": 0.3, "tail": 0.0}
    groups = [
        {"params": list(layer.parameters()), "weight_decay": decays.get(name, rule.weight_decay)}
        for name, layer in twin.items()
    ]
    optimizer = torch.optim.SGD(groups, lr=1.0, momentum=rule.momentum, nesterov=rule.nesterov)
    teacher = copy.deepcopy(network)
    arena = Arena(network, teacher, rule, decays=decays)
    averages = parameters(twin)
    for lr, phi in ((0.1, 0.0), (0.05, 0.5), (0.01, 2 / 3)):
        x = torch.randn(4, 3, generator=draws, dtype=torch.float64)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad()
        torch.stack([layer(x).sin().sum() for layer in twin.values()]).sum().backward()
        optimizer.step()
        averages = {n: phi * averages[n] + (1 - phi) * p.detach() for n, p in twin.named_parameters()}
        arena.differentiate([layer(x).sin().sum() for layer in network.values()], [None] * len(names))
        before = parameters(network)
        arena.update(scalar(lr), scalar(phi), GO + 1)
        assert equal(parameters(network), before), "stopped"
        arena.differentiate([layer(x).sin().sum() for layer in network.values()], [None] * len(names))
        arena.update(scalar(lr), scalar(phi), GO)
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(network.get_parameter(name), parameter, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(teacher.get_parameter(name), averages[name], rtol=1e-12, atol=1e-14)


def test_the_norm_is_that_of_all_gradients() -> None:
    network = make_network().double()
    arena = Arena(network, None, RULE)
    arena.differentiate([loss_of(network)], [None])
    norms = [p.grad.norm() for p in network.parameters() if p.grad is not None]
    assert arena.gradient_norm().item() == pytest.approx(torch.stack(norms).norm().item(), rel=1e-12)


def test_roots_are_added_each_times_its_seed() -> None:
    weight = nn.Linear(3, 2, bias=False).double()
    arena = Arena(weight, None, RULE)
    x, seed = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    arena.differentiate([weight(x), weight.weight.square().sum()], [seed, None])
    torch.testing.assert_close(weight.weight.grad, seed.T @ x + 2 * weight.weight.detach())


def test_gradients_arrive_in_any_layout() -> None:
    """As its weight lies, otherwise, of one pixel, and one number for all."""
    weights = nn.ParameterList(
        [
            torch.randn(4, 3, 2, 2).to(memory_format=LAST),
            torch.randn(4, 3, 2, 2),
            torch.randn(4, 3, 1, 1).to(memory_format=LAST),
            torch.randn(4, 3, 1, 1),
            torch.randn(4, 3).t(),
            torch.randn(1, 5),
            torch.randn(6),
        ]
    )
    factors = [
        torch.randn(weight.shape).to(memory_format=layout)
        for weight, layout in zip(list(weights)[:4], (LAST, LAST, torch.contiguous_format, LAST), strict=True)
    ]
    factors += [torch.randn(3, 4), torch.randn(5, 1).t(), torch.ones(()).expand(6)]
    arena = Arena(weights, None, RULE)
    for scale in (1.0, 2.0):
        products = [(weight * factor).sum() * scale for weight, factor in zip(weights, factors, strict=True)]
        arena.differentiate([torch.stack(products).sum()], [None])
        for weight, factor in zip(weights, factors, strict=True):
            assert torch.equal(weight.grad, factor * scale)


def test_a_weight_that_nothing_depends_on_decays_alone() -> None:
    """Its gradient is nought, also after a step in which it was not; torch's would leave it as it is."""
    layers = nn.ModuleDict({"used": nn.Linear(3, 2), "unused": nn.Linear(3, 2)}).double()
    arena = Arena(layers, None, RULE)
    x = torch.randn(4, 3, dtype=torch.float64)
    arena.differentiate([(layers["used"](x) + layers["unused"](x)).sum()], [None])
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in layers.parameters())
    arena.differentiate([layers["used"](x).sum()], [None])
    gradients = {name: p.grad for name, p in layers.named_parameters() if p.grad is not None}
    assert [name for name, grad in gradients.items() if not grad.any()] == ["unused.weight", "unused.bias"]
    before = parameters(layers)
    arena.update(scalar(0.1), scalar(0), GO)
    # Nesterov's first step goes (1 + momentum) times as far; all of it is weight decay here.
    kept = 1 - 0.1 * (1 + RULE.momentum) * RULE.weight_decay
    for name in ("unused.weight", "unused.bias"):
        torch.testing.assert_close(
            layers.get_parameter(name).detach(), kept * before[name], rtol=1e-13, atol=0
        )


def test_weights_of_several_types_are_refused() -> None:
    mixed = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double())
    with pytest.raises(AssertionError, match="one type, one device"):
        Arena(mixed, None, RULE)
