"""What a run amounts to before it starts: steps, parameters, floating-point operations."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pcl_fast.build import build_network
from pcl_fast.config import TRAIN_IMAGES, Config
from pcl_fast.models.zoo import find_backbone
from pcl_fast.objectives import make_objective
from pcl_fast.schedules import milestone_epoch


@dataclass(frozen=True, slots=True)
class RunFigures:
    """Derived numbers of a configuration. FLOPs count a multiplication and an addition as two.

    `train_flops_per_image` is one step's share: forward and backward (twice the forward) of every view,
    and the mean teachers' forward.
    """

    train_images: int
    global_batch: int
    views_per_image: int
    steps_per_epoch: int
    total_steps: int
    lr_drop_epochs: tuple[int, ...]
    trained_parameters: int
    deployed_parameters: int
    deployed_flops_per_image: int
    train_flops_per_image: int

    @property
    def deployed_bytes(self) -> int:
        """Size of the deployed network's float32 parameters."""
        return 4 * self.deployed_parameters

    @property
    def total_flops(self) -> int:
        """Of the whole training."""
        return self.train_flops_per_image * self.global_batch * self.total_steps


def run_figures(config: Config, train_images: int | None = None) -> RunFigures:
    """Derive the figures of a resolved configuration; builds its networks on the CPU.

    `train_images` are those of the data set at hand, if it is not the published one.
    """
    objective = make_objective(config)
    images = config.data.subset or train_images or TRAIN_IMAGES[config.data.dataset]
    batch = config.train.batch_size
    steps = images // batch if config.data.drop_last else -(-images // batch)
    network = build_network(config, objective)
    plain = find_backbone(config.model, config.split).build(config.data.classes)
    size = config.data.pixels
    forward = forward_flops(network, torch.zeros(objective.num_views, 1, 3, size, size))
    return RunFigures(
        train_images=images,
        global_batch=batch,
        views_per_image=objective.num_views,
        steps_per_epoch=steps,
        total_steps=steps * config.train.epochs,
        lr_drop_epochs=tuple(
            milestone_epoch(share, config.train.epochs) for share in config.optim.milestones
        ),
        trained_parameters=count_parameters(network),
        deployed_parameters=count_parameters(plain),
        deployed_flops_per_image=forward_flops(plain, torch.zeros(1, 3, size, size)),
        train_flops_per_image=forward * (4 if objective.uses_mean_teacher else 3),
    )


def count_parameters(module: nn.Module) -> int:
    """Numbers that training adjusts."""
    return sum(parameter.numel() for parameter in module.parameters())


@torch.no_grad()
def forward_flops(module: nn.Module, images: torch.Tensor) -> int:
    """Floating-point operations of one forward in eval mode (convolutions and matrix products)."""
    training = module.training
    with FlopCounterMode(display=False) as counter:
        module.eval()(images)
    module.train(training)
    return counter.get_total_flops()
