"""What a run amounts to before it starts: steps, parameters, floating-point operations."""

from dataclasses import dataclass

from pcl_fast.build import build_network, count_operations
from pcl_fast.config import TRAIN_IMAGES, Config
from pcl_fast.objectives import make_objective
from pcl_fast.schedules import milestone_epoch


@dataclass(frozen=True, slots=True)
class RunFigures:
    """Derived numbers of a configuration. FLOPs count a multiplication and an addition as two.

    `train_flops_per_image` is one step's share: forward and backward (twice the forward, once for the first
    layer, as an image wants no gradient) of every view, and the teachers' forward. A step takes
    `rank_batch` images on each of `ranks`, `global_batch` in all.
    """

    train_images: int
    ranks: int
    rank_batch: int
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
    images -= config.data.hold_out
    batch = config.global_batch
    steps = images // batch if config.data.drop_last else -(-images // batch)
    network = build_network(config, objective)
    plain = count_operations(config, objective)
    teacher = objective.uses_mean_teacher
    return RunFigures(
        train_images=images,
        ranks=config.ranks or 1,
        rank_batch=config.train.batch_size,
        global_batch=batch,
        views_per_image=objective.num_views,
        steps_per_epoch=steps,
        total_steps=steps * config.train.epochs,
        lr_drop_epochs=tuple(
            milestone_epoch(share, config.train.epochs) for share in config.optim.milestones
        ),
        trained_parameters=sum(parameter.numel() for parameter in network.parameters()),
        deployed_parameters=plain.parameters,
        deployed_flops_per_image=plain.forward_flops,
        train_flops_per_image=plain.step_flops(
            objective.num_views, objective.num_peers, objective.has_ensemble, teacher
        ),
    )


def describe_rate(config: Config) -> str:
    """The learning rate at the start in words: what it is scaled from, and its warm-up."""
    optim = config.optim
    parts = [f"{config.initial_lr:g}"]
    if optim.lr_batch is not None and optim.lr_batch != config.global_batch:
        parts[0] += f" = {optim.lr:g} x {config.global_batch:,} / {optim.lr_batch:,}"
    elif optim.lr_batch is None and (config.ranks or 1) > 1:
        parts.append("not scaled to the global batch (--optim.lr-batch)")
    if optim.warmup_epochs:
        parts.append(f"after {optim.warmup_epochs:g} epochs of warm-up")
    return ", ".join(parts)
