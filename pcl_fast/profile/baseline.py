"""The straightforward implementation that speed is measured against: PCL as one would first write it.

Eager float32, one view after the other, losses pair by pair, averages parameter by parameter. The same
method to rounding; only how it is computed differs.
"""

import copy
import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from pcl_fast.build import build_network
from pcl_fast.config import AmpConfig, Config
from pcl_fast.contract import ViewBatch
from pcl_fast.objectives import make_objective
from pcl_fast.step.train_step import Moment


class BaselineStep:
    """A training step of `config`'s method; call it with a batch and a moment of the schedules."""

    def __init__(self, config: Config) -> None:
        pcl = dataclasses.replace(config.pcl, trunk_views="loop")
        self.config = dataclasses.replace(
            config,
            pcl=pcl,
            amp=AmpConfig(dtype="float32"),
            channels_last="off",
            kernels="off",
            compile=False,
        )
        self.network = build_network(self.config, make_objective(self.config)).to(config.device).train()
        self.teacher = copy.deepcopy(self.network).requires_grad_(False)
        optim = config.optim
        self.optimizer = torch.optim.SGD(
            self.network.parameters(),
            optim.lr,
            optim.momentum,
            weight_decay=optim.weight_decay,
            nesterov=optim.nesterov,
        )

    def __call__(self, batch: ViewBatch, moment: Moment) -> Tensor:
        """Train on a batch; the loss, a scalar."""
        for group in self.optimizer.param_groups:
            group["lr"] = moment.lr
        loss = self._loss(batch, float(moment.distill_weight))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        if self.config.method == "pcl":
            self._average(float(moment.ema_coefficient))
        return loss.detach()

    def _loss(self, batch: ViewBatch, weight: float) -> Tensor:
        student = self.network(batch.views_VBCHW)
        loss = torch.zeros((), device=batch.labels_B.device)
        for z_BC in student.logits_VBC:
            loss = loss + F.cross_entropy(z_BC, batch.labels_B)
        if self.config.method == "vanilla":
            return loss
        with torch.no_grad():
            teacher_VBC = self.teacher(batch.views_VBCHW).logits_VBC
        ensemble_BC = student.ensemble_logits_BC
        loss = loss + F.cross_entropy(ensemble_BC, batch.labels_B)
        for j, z_BC in enumerate(student.logits_VBC):
            loss = loss + weight * self._distil(ensemble_BC.detach(), z_BC)
            others = [q_BC for k, q_BC in enumerate(teacher_VBC) if k != j]
            for q_BC in others:
                loss = loss + weight * self._distil(q_BC, z_BC) / len(others)
        return loss

    def _distil(self, target_BC: Tensor, logits_BC: Tensor) -> Tensor:
        """T^2 KL(target^T || logits^T), averaged over the batch."""
        temperature = self.config.pcl.temperature
        target_BC = F.softmax(target_BC / temperature, dim=1)
        log_BC = F.log_softmax(logits_BC / temperature, dim=1)
        return temperature**2 * F.kl_div(log_BC, target_BC, reduction="batchmean")

    @torch.no_grad()
    def _average(self, phi: float) -> None:
        for average, value in zip(self.teacher.parameters(), self.network.parameters(), strict=True):
            average.mul_(phi).add_(value, alpha=1 - phi)
