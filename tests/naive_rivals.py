"""The methods that PCL is compared with, written one peer after the other from their equations: an oracle.

Shares with the package nothing but plain backbones, whose layers it calls by name. Each is as fast as obvious
code. m peers z_j, B images a batch, C classes, T the temperature, w the weight of distillation.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Logits = list[Tensor]


def kl(target: Tensor, student: Tensor, temperature: float) -> Tensor:
    """T^2 KL(target^T || student^T), averaged over the batch."""
    p = F.softmax(target / temperature, dim=1)
    q = F.softmax(student / temperature, dim=1)
    return temperature**2 * (p * (p.log() - q.log())).sum(1).mean()


def hard(z: Logits, labels: Tensor) -> Tensor:
    """The peers' cross-entropies, added."""
    return torch.stack([F.cross_entropy(each, labels) for each in z]).sum()


class NaivePeers(nn.Module):
    """m CIFAR ResNets; if they share, all use the first one's stem and first two stages."""

    def __init__(self, networks: Sequence[nn.Module], shares: bool, into_trunk: float = 1.0) -> None:
        super().__init__()
        self.networks, self.shares, self.into_trunk = nn.ModuleList(networks), shares, into_trunk
        if shares:
            for network in networks[1:]:
                for name in ("stem", "stage1", "stage2"):
                    setattr(network, name, None)

    def forward(self, views: Tensor) -> tuple[Tensor, Logits, Logits, Logits]:
        """Views [V, B, 3, H, W] to the first trunk map, last maps, features and logits of each peer."""
        trunk_maps: dict[tuple[int, int], Tensor] = {}
        maps, h, z = [], [], []
        for j, network in enumerate(self.networks):
            of, view = (0 if self.shares else j), j % len(views)
            if (of, view) not in trunk_maps:
                owner = self.networks[of]
                made = owner.stage2(owner.stage1(owner.stem(views[view])))  # pyright: ignore
                if self.into_trunk != 1.0:
                    made.register_hook(lambda grad: grad * self.into_trunk)
                trunk_maps[of, view] = made
            maps.append(network.stage3(trunk_maps[of, view]))  # pyright: ignore[reportCallIssue]
            h.append(maps[-1].mean((2, 3)))
            z.append(network.classifier(h[-1]))  # pyright: ignore[reportCallIssue]
        return next(iter(trunk_maps.values())), maps, h, z


@dataclass
class Said:
    """What a network has said of a batch, and its head of what it said."""

    trunk_map: Tensor
    maps: Logits
    h: Logits
    z: Logits
    head: nn.Module | None


def vanilla(said: Said, y: Tensor, w: float) -> Tensor:
    """CE of one network."""
    return hard(said.z, y)


def dml(said: Said, y: Tensor, w: float) -> Tensor:
    """Each learns from each other one, at T = 1."""
    z, total = said.z, hard(said.z, y)
    for j in range(len(z)):
        for k in range(len(z)):
            if k != j:
                total = total + kl(z[k].detach(), z[j], 1.0) / (len(z) - 1)
    return total


def cl(said: Said, y: Tensor, w: float) -> Tensor:
    """Half the labels, half what the other heads say on average, at T = 2."""
    z, total = said.z, 0.5 * hard(said.z, y)
    for j in range(len(z)):
        others = torch.stack([z[k] for k in range(len(z)) if k != j]).mean(0).detach()
        q = F.softmax(others / 2.0, dim=1)
        total = total + 0.5 * 2.0**2 * -(q * F.log_softmax(z[j] / 2.0, dim=1)).sum(1).mean()
    return total


class Gate(nn.Module):
    """FC and BN of ONE."""

    def __init__(self, m: int) -> None:
        super().__init__()
        self.fc, self.bn = nn.Linear(32, m), nn.BatchNorm1d(m)


def one(said: Said, y: Tensor, w: float) -> Tensor:
    """A gated mean of the branches' logits teaches each of them, at T = 3."""
    gate, z = said.head, said.z
    assert isinstance(gate, Gate)
    g = F.softmax(F.relu(gate.bn(gate.fc(said.trunk_map.mean((2, 3))))), dim=1)
    z_e = torch.zeros_like(z[0])
    for j in range(len(z)):
        z_e = z_e + g[:, j : j + 1] * z[j]
    total = hard(z, y) + F.cross_entropy(z_e, y)
    for each in z:
        total = total + w * kl(z_e.detach(), each, 3.0)
    return total


class Attention(nn.Module):
    """W_q and W_k of OKDDip: d -> d/8, no bias."""

    def __init__(self, m: int) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(64, 8, bias=False), nn.Linear(64, 8, bias=False)


def okddip(said: Said, y: Tensor, w: float) -> Tensor:
    """Peers learn from what they attend to, which the attention learns, and the leader from their mean."""
    head, z, peers = said.head, said.z, len(said.z) - 1
    assert isinstance(head, Attention)
    total = hard(z, y)
    for a in range(peers):
        scores = [(head.q(said.h[a]) * head.k(said.h[b])).sum(1) for b in range(peers)]
        alpha = F.softmax(torch.stack(scores, dim=1), dim=1)
        t_a = torch.zeros_like(z[0])
        for b in range(peers):
            t_a = t_a + alpha[:, b : b + 1] * z[b].detach()
        total = total + w * kl(t_a, z[a], 3.0)
    return total + w * kl(torch.stack(z[:peers]).mean(0).detach(), z[peers], 3.0)


class Fusion(nn.Module):
    """The fused classifier of FFL over m maps of 64 channels."""

    def __init__(self, m: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(64 * m, 64 * m, 3, padding=1, groups=64 * m, bias=False),
            nn.BatchNorm2d(64 * m),
            nn.ReLU(),
            nn.Conv2d(64 * m, 64, 1, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(64, 10),
        )


def ffl(said: Said, y: Tensor, w: float) -> Tensor:
    """The fusion teaches each branch, and the mean of all branches the fusion, at T = 3."""
    assert isinstance(said.head, Fusion)
    z, z_f = said.z, said.head.net(torch.cat(said.maps, dim=1))
    total = hard(z, y) + F.cross_entropy(z_f, y)
    for each in z:
        total = total + w * kl(z_f.detach(), each, 3.0)
    return total + w * kl(torch.stack(z).mean(0).detach(), z_f, 3.0)


def minlogit(z: Logits, y: Tensor) -> Tensor:
    """Class by class the least of the logits, each less its label's."""
    target = torch.empty_like(z[0])
    for image in range(len(y)):
        for c in range(target.shape[1]):
            target[image, c] = min(each[image, c] - each[image, y[image]] for each in z)
    return target


def naive(z: Logits, y: Tensor) -> Tensor:
    """Image by image the logits of the network of the lowest cross-entropy."""
    rows = []
    for image in range(len(y)):
        costs = [F.cross_entropy(each[image : image + 1], y[image : image + 1]).item() for each in z]
        rows.append(z[costs.index(min(costs))][image])
    return torch.stack(rows)


def kdcl_minlogit(said: Said, y: Tensor, w: float) -> Tensor:
    """One target teaches all, at T = 2."""
    target = minlogit([each.detach() for each in said.z], y)
    return hard(said.z, y) + torch.stack([kl(target, each, 2.0) for each in said.z]).sum()


def kdcl_naive(said: Said, y: Tensor, w: float) -> Tensor:
    """One target teaches all, at T = 2."""
    target = naive([each.detach() for each in said.z], y)
    return hard(said.z, y) + torch.stack([kl(target, each, 2.0) for each in said.z]).sum()
