"""The straightforward implementation that speed is measured against: a method as one would first write it.

Eager float32, one view after the other, torch's SGD, averages parameter by parameter; PCL's losses pair by
pair, other methods' by their own terms. The same method to rounding; only how it is computed differs. With
`amp` also in autocast and channels-last, which most people try first.
"""

import copy
import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pcl_fast.build import build_network
from pcl_fast.config import AmpConfig, Config
from pcl_fast.contract import PeerOutputs, ViewBatch
from pcl_fast.models.peers import PeerNetwork
from pcl_fast.objectives import make_objective
from pcl_fast.objectives.base import full_precision
from pcl_fast.objectives.pcl import Pcl
from pcl_fast.step.train_step import Moment
from pcl_fast.trained_teacher import load_teacher


def baseline_config(config: Config, amp: bool = False) -> Config:
    """How the straightforward implementation does what a resolved configuration wants."""
    return dataclasses.replace(
        config,
        pcl=dataclasses.replace(config.pcl, trunk_views="loop"),
        amp=AmpConfig(dtype="bfloat16" if amp else "float32"),
        channels_last="on" if amp else "off",
        kernels="off",
        compile=False,
        capture="off",
    )


class BaselineStep:
    """A training step of a `baseline_config`; call it with a batch and a moment of the schedules."""

    def __init__(self, config: Config) -> None:
        self.config = config
        objective = make_objective(self.config)
        self.network = build_network(self.config, objective).to(config.device).train()
        averages = objective.uses_mean_teacher
        self.teacher = copy.deepcopy(self.network).requires_grad_(False) if averages else None
        self.objective = objective
        trained = load_teacher(self.config) if objective.uses_trained_teacher else None
        self.trained = None if trained is None else trained.to(config.device)
        self.optimizer = self._optimizer()

    def _optimizer(self) -> torch.optim.SGD:
        """With a weight decay of its own for the head, if the method has one."""
        optim, own = self.config.optim, self.objective.head_weight_decay
        head = (
            [] if own is None or self.network.ensemble is None else list(self.network.ensemble.parameters())
        )
        known = set(head)
        groups: list[dict[str, Any]] = [{"params": [p for p in self.network.parameters() if p not in known]}]
        if head:
            groups.append({"params": head, "weight_decay": own})
        return torch.optim.SGD(
            groups, optim.lr, optim.momentum, weight_decay=optim.weight_decay, nesterov=optim.nesterov
        )

    def __call__(self, batch: ViewBatch, moment: Moment) -> Tensor:
        """Train on a batch; the loss, a scalar."""
        for group in self.optimizer.param_groups:
            group["lr"] = moment.lr
        loss = self._loss(batch, float(moment.distill_weight))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        if self.teacher is not None:
            self._average(self.teacher, float(moment.ema_coefficient))
        return loss.detach()

    def _loss(self, batch: ViewBatch, weight: float) -> Tensor:
        student, teacher = self._forwards(batch.views_VBCHW)
        if not isinstance(self.objective, Pcl):
            return self.objective.terms(student, teacher, batch.labels_B, weight).sum()
        logits_VBC, ensemble_BC = full_precision(student.logits_VBC), student.ensemble_logits_BC
        ensemble_BC = None if ensemble_BC is None else full_precision(ensemble_BC)
        teacher_VBC = None if teacher is None else full_precision(teacher.logits_VBC)
        pcl = self.config.pcl
        loss = torch.zeros((), device=batch.labels_B.device)
        for z_BC in logits_VBC:
            loss = loss + F.cross_entropy(z_BC, batch.labels_B)
        if ensemble_BC is not None:
            loss = loss + F.cross_entropy(ensemble_BC, batch.labels_B)
        if ensemble_BC is not None and pcl.ensemble_teacher:
            target_BC = ensemble_BC.detach() if pcl.detach_ensemble else ensemble_BC
            for z_BC in logits_VBC:
                loss = loss + weight * self._distil(target_BC, z_BC)
        if teacher_VBC is not None and pcl.mean_teacher:
            for j, z_BC in enumerate(logits_VBC):
                others = [q_BC for k, q_BC in enumerate(teacher_VBC) if k != j]
                for q_BC in others:
                    loss = loss + weight * self._distil(q_BC, z_BC) / len(others)
        return loss

    def _forwards(self, views_VBCHW: Tensor) -> tuple[PeerOutputs, PeerOutputs | None]:
        """What the network says, and its teachers."""
        amp, said = self.config.amp.dtype == "bfloat16", None
        teacher = self.teacher or self.trained
        with torch.autocast(views_VBCHW.device.type, torch.bfloat16, enabled=amp):
            student = self.network(views_VBCHW)
            if teacher is not None:
                with torch.no_grad():
                    said = teacher(views_VBCHW)
        return student, said

    def _distil(self, target_BC: Tensor, logits_BC: Tensor) -> Tensor:
        """T^2 KL(target^T || logits^T), averaged over the batch."""
        temperature = self.config.pcl.temperature
        target_BC = F.softmax(target_BC / temperature, dim=1)
        log_BC = F.log_softmax(logits_BC / temperature, dim=1)
        return temperature**2 * F.kl_div(log_BC, target_BC, reduction="batchmean")

    @torch.no_grad()
    def _average(self, teacher: PeerNetwork, phi: float) -> None:
        for average, value in zip(teacher.parameters(), self.network.parameters(), strict=True):
            average.mul_(phi).add_(value, alpha=1 - phi)
