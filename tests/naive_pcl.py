"""Peer Collaborative Learning written view by view, straight from its equations: the oracle of the tests.

Wu and Gong, "Peer Collaborative Learning for Online Knowledge Distillation", AAAI 2021, arXiv 2006.04147v2.
Shares nothing with the package and is as fast as obvious code. m peers, B images a batch, C classes.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

FEATURE_WIDTH = 64  # of the stage widths 16, 32, 64


@dataclass(frozen=True)
class Hyper:
    """The constants of a run; epochs count from 0."""

    num_peers: int = 3  # at least 2
    temperature: float = 3.0
    lambda_: float = 1.0
    alpha: float = 80.0  # epochs of ramp-up
    ema_decay: float = 0.999
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    milestones: tuple[int, ...] = (150, 225)
    gamma: float = 0.1


class BasicBlock(nn.Module):
    """conv-BN-ReLU-conv-BN plus the shortcut, then ReLU; 1x1 conv + BN where the shape changes."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels_out:
            projection = nn.Conv2d(channels_in, channels_out, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(channels_out))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


def make_stage(channels_in: int, channels_out: int, stride: int, num_blocks: int) -> nn.Sequential:
    """The first block changes the shape, the others keep it."""
    blocks = [BasicBlock(channels_in, channels_out, stride)]
    blocks += [BasicBlock(channels_out, channels_out, 1) for _ in range(num_blocks - 1)]
    return nn.Sequential(*blocks)


def make_trunk(num_blocks: int) -> nn.Sequential:
    """Stem and stages 1 and 2: [B, 3, H, W] to [B, 32, H/2, W/2]."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        make_stage(16, 16, 1, num_blocks),
        make_stage(16, 32, 2, num_blocks),
    )


def make_branch(num_blocks: int) -> nn.Sequential:
    """Stage 3 and the global average pool: [B, 32, H/2, W/2] to [B, 64]."""
    return nn.Sequential(make_stage(32, 64, 2, num_blocks), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def init_convolutions(model: nn.Module) -> None:
    """He's normal initialisation; batch norms and linear layers keep PyTorch's."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class NaiveResNet(nn.Module):
    """One CIFAR ResNet of [n, n, n] basic blocks: n = 1 is ResNet-8, n = 5 is ResNet-32."""

    def __init__(self, num_blocks: int, num_classes: int) -> None:
        super().__init__()
        self.trunk = make_trunk(num_blocks)
        self.branch = make_branch(num_blocks)
        self.classifier = nn.Linear(FEATURE_WIDTH, num_classes)
        init_convolutions(self)

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] to logits [B, C]."""
        return self.classifier(self.branch(self.trunk(images)))


class NaivePCL(nn.Module):
    """A shared trunk, m branches, m classifiers and the ensemble classifier over the m features."""

    def __init__(self, num_blocks: int, num_classes: int, num_peers: int) -> None:
        super().__init__()
        self.num_peers = num_peers
        self.trunk = make_trunk(num_blocks)
        self.branches = nn.ModuleList([make_branch(num_blocks) for _ in range(num_peers)])
        self.classifiers = nn.ModuleList([nn.Linear(FEATURE_WIDTH, num_classes) for _ in range(num_peers)])
        self.ensemble = nn.Linear(num_peers * FEATURE_WIDTH, num_classes)
        init_convolutions(self)

    def forward(self, views: Tensor | Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        """m views [B, 3, H, W] to the m peer logits z_j [B, C] and the ensemble teacher logits z_t [B, C]."""
        h, z = [], []
        for j in range(self.num_peers):  # so the trunk's batch norms see the views one after the other
            h.append(self.branches[j](self.trunk(views[j])))
            z.append(self.classifiers[j](h[j]))  # z_j = B_j h_j
        return z, self.ensemble(torch.cat(h, dim=1))  # z_t = A [h_1; ...; h_m]


def rampup_weight(epoch: float, hyper: Hyper) -> float:
    """w(e): lambda exp(-5 (1 - e/alpha)^2) until epoch alpha, lambda from there on."""
    if epoch >= hyper.alpha:
        return hyper.lambda_
    return hyper.lambda_ * math.exp(-5.0 * (1.0 - epoch / hyper.alpha) ** 2)


def ema_phi(g: int, hyper: Hyper) -> float:
    """phi(g) of step g = 1, 2, ...: 0 at the first step, so that it copies the student."""
    return min(1.0 - 1.0 / g, hyper.ema_decay)


def set_learning_rate(optimizer: Optimizer, epoch: float, hyper: Hyper) -> None:
    """The lr is multiplied by gamma at every milestone epoch."""
    milestones_passed = sum(epoch >= milestone for milestone in hyper.milestones)
    for group in optimizer.param_groups:
        group["lr"] = hyper.lr * hyper.gamma**milestones_passed


def kl_divergence(target_logits: Tensor, student_logits: Tensor, temperature: float) -> Tensor:
    """KL(target^T || student^T), summed over classes and averaged over the batch; the target is detached."""
    log_target = F.log_softmax(target_logits.detach() / temperature, dim=1)
    log_student = F.log_softmax(student_logits / temperature, dim=1)
    return (log_target.exp() * (log_target - log_student)).sum(dim=1).mean()


def pcl_losses(
    z: Sequence[Tensor], z_t: Tensor, q: Sequence[Tensor], labels: Tensor, epoch: float, hyper: Hyper
) -> dict[str, Tensor]:
    """L = sum_j CE(z_j, y) + CE(z_t, y) + L_pe + L_pm, and each of its terms as it enters the sum.

    Logits [B, C]: z of the m peers, z_t of the ensemble teacher, q of the m mean teachers. Labels [B].
    """
    m, temperature = hyper.num_peers, hyper.temperature
    weight = rampup_weight(epoch, hyper)
    ce_peers = torch.stack([F.cross_entropy(z[j], labels) for j in range(m)])
    ce_ensemble = F.cross_entropy(z_t, labels)

    pe_sum = torch.zeros_like(ce_ensemble)
    for j in range(m):  # the ensemble teacher teaches every peer
        pe_sum = pe_sum + kl_divergence(z_t, z[j], temperature)
    pe = weight * temperature**2 * pe_sum

    pm_sum = torch.zeros_like(ce_ensemble)
    for j in range(m):
        for k in range(m):
            if k != j:  # a peer is never taught by its own mean teacher
                pm_sum = pm_sum + kl_divergence(q[k], z[j], temperature)
    pm = weight * temperature**2 * (1.0 / (m - 1)) * pm_sum

    total = ce_peers.sum() + ce_ensemble + pe + pm
    return {"total": total, "ce_peers": ce_peers, "ce_ensemble": ce_ensemble, "pe": pe, "pm": pm}


def make_teacher(model: NaivePCL) -> NaivePCL:
    """The mean teacher: a copy in train mode, with running statistics of its own and no gradient."""
    return copy.deepcopy(model).train().requires_grad_(False)


def make_optimizer(model: nn.Module, hyper: Hyper) -> SGD:
    """SGD with Nesterov momentum over every parameter."""
    return SGD(model.parameters(), hyper.lr, hyper.momentum, weight_decay=hyper.weight_decay, nesterov=True)


@torch.no_grad()
def update_teacher(teacher: NaivePCL, model: NaivePCL, phi: float) -> None:
    """theta_ema = phi theta_ema + (1 - phi) theta: parameters only, the buffers stay the teacher's own."""
    for theta_ema, theta in zip(teacher.parameters(), model.parameters(), strict=True):
        theta_ema.copy_(phi * theta_ema + (1.0 - phi) * theta)


def naive_step(
    model: NaivePCL,
    teacher: NaivePCL,
    optimizer: Optimizer,
    views: Tensor,
    labels: Tensor,
    epoch: float,
    g: int,
    hyper: Hyper,
) -> dict[str, Tensor]:
    """Step g = 1, 2, ... on views [m, B, 3, H, W] and labels [B]; returns the detached loss terms."""
    set_learning_rate(optimizer, epoch, hyper)
    z, z_t = model(views)
    with torch.no_grad():
        q, _ = teacher(views)  # mean teacher j sees view j
    losses = pcl_losses(z, z_t, q, labels, epoch, hyper)
    optimizer.zero_grad()
    losses["total"].backward()
    optimizer.step()
    update_teacher(teacher, model, ema_phi(g, hyper))
    return {name: value.detach() for name, value in losses.items()}


def naive_vanilla_step(
    model: NaiveResNet, optimizer: Optimizer, images: Tensor, labels: Tensor, epoch: float, hyper: Hyper
) -> dict[str, Tensor]:
    """One step of ordinary training on images [B, 3, H, W] and labels [B]."""
    set_learning_rate(optimizer, epoch, hyper)
    total = F.cross_entropy(model(images), labels)
    optimizer.zero_grad()
    total.backward()
    optimizer.step()
    return {"total": total.detach()}


def naive_train(
    model: NaivePCL, batches: Sequence[tuple[Tensor, Tensor]], epochs: Sequence[float], hyper: Hyper
) -> tuple[list[dict[str, Tensor]], NaivePCL, NaivePCL]:
    """One step for each batch (views, labels) at the epoch beside it; the model is trained in place.

    Returns the loss terms of every step, the model and its mean teacher (`own` batch norm).
    """
    model.train()
    teacher = make_teacher(model)
    optimizer = make_optimizer(model, hyper)
    history = []
    for g, ((views, labels), epoch) in enumerate(zip(batches, epochs, strict=True), start=1):
        history.append(naive_step(model, teacher, optimizer, views, labels, epoch, g, hyper))
    return history, model, teacher


@torch.no_grad()
def naive_predict(teacher: NaivePCL, images: Tensor) -> tuple[Tensor, Tensor]:
    """Test images [B, 3, H, W] to the logits of PCL (mean teacher's first peer) and of PCL-E, each [B, C]."""
    teacher.eval()
    peer_logits, ensemble_logits = teacher([images] * teacher.num_peers)
    teacher.train()  # as it always is during training
    return peer_logits[0], ensemble_logits
