"""The weights of a run in flat buffers, so that an update is one pass over memory.

Parameters, gradients, momentum and averages lie one after the other, each parameter in the memory format it
came in, and begin at multiples of 128 bytes. The networks' parameters become views of them: their names,
shapes and state dicts stay what they were.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pcl_fast.kernels.sgd_ema import FlatBuffers, SgdRule, sgd_ema

ALIGNMENT = 64  # elements: 256 bytes of float32, 128 of bfloat16

Tensors = dict[str, Tensor]


class Arena:
    """Flat buffers of a network's weights and, if it has one, of its mean teacher's.

    With `half`, a type, both have copies in it, which an update keeps up to date: `student_half` and
    `teacher_half` map names to those that convolutions and matrix products read, so that a forward casts
    nothing. Norms are left out of them. `decays` are weight decays of some parts, by the name of the module,
    in the place of the rule's.
    """

    def __init__(
        self,
        network: nn.Module,
        teacher: nn.Module | None,
        rule: SgdRule,
        half: torch.dtype | None = None,
        decays: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        weights = dict(network.named_parameters())
        self.rule = rule
        self._places = _lay_out(weights)
        values = _flat(self._places, weights)
        averages = None if teacher is None else values.clone()
        self.buffers = FlatBuffers(
            values=values,
            gradients=torch.zeros_like(values),
            momentum=torch.zeros_like(values),
            averages=averages,
            half_values=None if half is None else torch.empty_like(values, dtype=half),
            half_averages=None if half is None or averages is None else torch.empty_like(values, dtype=half),
        )
        self._gradients = self._views(self.buffers.gradients)
        self.momentum: Mapping[str, Tensor] = self._views(self.buffers.momentum)
        self._move_in(network, teacher)
        self.refresh_half()
        halved = _cast_by_autocast(network)
        self.student_half = self._half_views(self.buffers.half_values, halved, learns=True)
        self.teacher_half = self._half_views(self.buffers.half_averages, halved, learns=False)
        self._apart = [self._decayed_apart(name, decay) for name, decay in decays.items()]
        self._leaves = [self.student_half.get(name, weight) for name, weight in weights.items()]

    def _decayed_apart(self, module: str, decay: float) -> "_DecayedApart":
        values = self._views(self.buffers.values)
        names = [name for name in values if name.startswith(f"{module}.")]
        own = [values[name] for name in names], [self._gradients[name] for name in names]
        return _DecayedApart(*own, decay - self.rule.weight_decay)

    def _move_in(self, network: nn.Module, teacher: nn.Module | None) -> None:
        """Make the networks' parameters, and their gradients, views of the buffers."""
        values = self._views(self.buffers.values)
        for name, parameter in network.named_parameters():
            parameter.data, parameter.grad = values[name], self._gradients[name]
        if teacher is not None:
            assert self.buffers.averages is not None
            averages = self._views(self.buffers.averages)
            for name, parameter in teacher.named_parameters():
                averages[name].copy_(parameter.detach())
                parameter.data = averages[name]

    def differentiate(self, roots: Sequence[Tensor], seeds: Sequence[Tensor | None]) -> None:
        """Write the gradients of all weights: of the sum of `roots`, each times its seed (None: 1).

        They replace those of the step before; a weight that no root depends on gets zero.
        """
        found = torch.autograd.grad(roots, self._leaves, seeds, allow_unused=True)
        alike: dict[tuple[torch.dtype, bool], list[tuple[Tensor, Tensor]]] = {}
        for place, gradient in zip(self._gradients.values(), found, strict=True):
            if gradient is None:  # pyright: ignore[reportUnnecessaryComparison]  # a weight that is not used
                place.zero_()
            else:
                fits, laid_out = _in_layout(gradient, place)
                alike.setdefault((gradient.dtype, fits), []).append((place, laid_out))
        for pairs in alike.values():  # one launch copies many, if all are of a kind
            places, gradients = zip(*pairs, strict=True)
            torch._foreach_copy_(places, gradients)  # pyright: ignore[reportPrivateUsage]

    def gradient_norm(self) -> Tensor:
        """The norm of all gradients together, a scalar on the device."""
        return torch.linalg.vector_norm(self.buffers.gradients)

    def update(self, lr: Tensor, phi: Tensor, stop: Tensor) -> None:
        """SGD, then the mean teacher's average (PCL eq. 4); nothing where `stop` is above 0.

        `lr`, `phi` (float64) and `stop` (float32) are scalars on the device.
        """
        for part in self._apart:  # less what the rule's decay adds to all of them
            torch._foreach_add_(  # pyright: ignore[reportPrivateUsage]
                part.gradients, part.values, alpha=part.difference
            )
        sgd_ema(self.buffers, self.rule, lr, phi, stop)

    def load_momentum(self, saved: Mapping[str, Tensor]) -> None:
        """Go on from saved momentum, by the names of the parameters."""
        assert saved.keys() == self.momentum.keys(), "momentum of another network"
        for name, buffer in self.momentum.items():
            buffer.copy_(saved[name])

    def refresh_half(self) -> None:
        """Make the half copies anew, after weights were changed by something else than an update."""
        flat = self.buffers
        for half, whole in ((flat.half_values, flat.values), (flat.half_averages, flat.averages)):
            if half is not None and whole is not None:
                half.copy_(whole)

    def _views(self, flat: Tensor) -> Tensors:
        return {name: flat.as_strided(*place) for name, place in self._places.items()}

    def _half_views(self, flat: Tensor | None, names: set[str], learns: bool) -> Tensors:
        if flat is None:
            return {}
        views = self._views(flat)
        return {name: views[name].requires_grad_(learns) for name in views if name in names}


class _DecayedApart(NamedTuple):
    """Weights with a decay of their own, their gradients, and how far it is from that of all others."""

    values: list[Tensor]
    gradients: list[Tensor]
    difference: float


_Place = tuple[torch.Size, tuple[int, ...], int]


def _lay_out(weights: Mapping[str, Tensor]) -> dict[str, _Place]:
    """Each one's shape and strides, and where it begins in a flat buffer."""
    places: dict[str, _Place] = {}
    begin = 0
    for name, weight in weights.items():
        places[name] = weight.shape, torch.empty_like(weight, device="meta").stride(), begin
        begin += -(-weight.numel() // ALIGNMENT) * ALIGNMENT
    return places


def _flat(places: Mapping[str, _Place], weights: Mapping[str, Tensor]) -> Tensor:
    shape, _, begin = list(places.values())[-1]
    some = next(iter(weights.values()))
    assert len({(weight.dtype, weight.device) for weight in weights.values()}) == 1, "one type, one device"
    size = -(-(begin + shape.numel()) // ALIGNMENT) * ALIGNMENT
    flat = torch.zeros(size, dtype=some.dtype, device=some.device)
    for name, place in places.items():
        flat.as_strided(*place).copy_(weights[name].detach())
    return flat


def _in_layout(gradient: Tensor, place: Tensor) -> tuple[bool, Tensor]:
    """Whether a gradient lies as its place does, which many are copied at once for; and it, with its strides.

    Strides of dimensions of size 1 say nothing, and differ for kernels of one pixel.
    """
    sizes = zip(place.shape, gradient.stride(), place.stride(), strict=True)
    if any(mine != wanted for size, mine, wanted in sizes if size > 1):
        return False, gradient
    return True, gradient.as_strided(place.shape, place.stride())


def _cast_by_autocast(network: nn.Module) -> set[str]:
    """The names of the weights that autocast would cast: those of convolutions and linear layers."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    owners = {name: layer for name, layer in network.named_modules() if isinstance(layer, kinds)}
    return {
        f"{name}.{own}" if name else own
        for name, layer in owners.items()
        for own, _ in layer.named_parameters(recurse=False)
        if type(layer) in kinds
    }
