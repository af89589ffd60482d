"""How a run is trained: optimizer, length, precision, several processes."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

from pcl_fast.config.require import require


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """SGD and its schedule."""

    lr: float = 0.1
    """Learning rate at the start."""
    lr_batch: int | None = None
    """The global batch that LR is for; with another one it is scaled in proportion. By default it is not."""
    warmup_epochs: float = 0.0
    """Epochs in which the learning rate rises from 0, step by step."""
    momentum: float = 0.9
    """Momentum."""
    nesterov: bool = True
    """Nesterov's momentum."""
    weight_decay: float = 5e-4
    """Weight decay, on every parameter."""
    milestones: tuple[float, ...] = (150 / 300, 225 / 300)
    """Shares of the run after which the learning rate is multiplied by GAMMA."""
    gamma: float = 0.1
    """The factor at each milestone."""

    def __post_init__(self) -> None:
        """Validate."""
        require(self.lr > 0, "optim.lr", self.lr, "give a positive number, as 0.1")
        require(
            self.lr_batch is None or self.lr_batch > 0, "optim.lr-batch", self.lr_batch, "give at least 1"
        )
        require(self.warmup_epochs >= 0, "optim.warmup-epochs", self.warmup_epochs, "give 0 or more")
        require(0 <= self.momentum < 1, "optim.momentum", self.momentum, "give 0 or more, below 1")
        require(self.weight_decay >= 0, "optim.weight-decay", self.weight_decay, "give 0 or more")
        require(self.gamma > 0, "optim.gamma", self.gamma, "give a positive number, as 0.1")
        shares = self.milestones
        fix = "give rising shares of the run: epoch 150 of 300 is 0.5"
        require(
            all(0 < s < 1 for s in shares) and sorted(shares) == list(shares), "optim.milestones", shares, fix
        )
        require(
            not self.nesterov or self.momentum > 0, "optim.nesterov", True, "needs --optim.momentum above 0"
        )


MAY_BE_ZERO = ("save_seconds", "save_steps", "skip_spikes")
SHARES = ("label_smoothing", "mixup")  # which have rules of their own


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long, how much at once, how often to look."""

    epochs: int = 300
    """Passes over the training images."""
    batch_size: int = 128
    """Images a step, on each device; each becomes one view per peer."""
    eval_batch_size: int = 500
    """Images a batch in evaluation."""
    eval_every: int = 1
    """Evaluate after every EVAL_EVERY epochs, and after the last."""
    save_every: int = 1
    """Save a checkpoint after every SAVE_EVERY epochs, and after the last."""
    save_seconds: float = 20.0
    """But not so soon after the last one: with epochs of a second, writing would take a tenth of the time."""
    save_steps: int = 0
    """Save within epochs, too, after every SAVE_STEPS steps; 0: not."""
    log_every: int = 50
    """Write the mean of every term to metrics.jsonl each LOG_EVERY steps."""
    skip_spikes: float = 0.0
    """Skip the update of a step whose gradient norm is above SKIP_SPIKES times its running median, as 10;
    0: never."""
    skip_at_most: int = 3
    """But no more than so many steps in a row."""
    label_smoothing: float = 0.0
    """What of each label is spread over all classes alike; 0: nothing. Not what the paper did."""
    mixup: float = 0.0
    """Mix each image, and its label, with another one of the batch; the share lambda of each step is from
    Beta(MIXUP, MIXUP). 0: not. Not what the paper did. With it, or with soft labels, PCL's loss is computed
    in plain operations, not by its kernel."""

    def __post_init__(self) -> None:
        """Validate."""
        for spec in dataclasses.fields(self):
            if spec.name not in SHARES:
                value, least = getattr(self, spec.name), 0 if spec.name in MAY_BE_ZERO else 1
                require(
                    value >= least, f"train.{spec.name.replace('_', '-')}", value, f"give at least {least}"
                )
        spikes = self.skip_spikes
        require(spikes == 0 or spikes > 1, "train.skip-spikes", spikes, "give a factor above 1, or 0")
        share, alpha = self.label_smoothing, self.mixup
        require(0 <= share < 1, "train.label-smoothing", share, "give a share, 0 or more, below 1")
        require(0 <= alpha < math.inf, "train.mixup", alpha, "give 0 (off) or a positive number, as 0.2")


@dataclass(frozen=True, kw_only=True)
class AmpConfig:
    """Mixed precision."""

    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Precision of convolutions and their activations; weights, losses and the EMA are always float32.

    `auto` is bfloat16 where the device has it, else float32; float16, with a loss scale, is for older GPUs.
    """


@dataclass(frozen=True, kw_only=True)
class DistConfig:
    """Several processes, a GPU each."""

    timeout: float = 600.0
    """Seconds without progress after which a rank gives up, saying where each of them is."""
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"
    """In which precision gradients travel between ranks."""

    def __post_init__(self) -> None:
        """Validate."""
        require(self.timeout > 0, "dist.timeout", self.timeout, "give a positive number of seconds")
