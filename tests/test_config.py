"""Settings: what is refused and with which words, and that nothing is lost on the way to a file and back."""

import dataclasses
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pcl_fast.config import (
    ClConfig,
    Config,
    DataConfig,
    DistConfig,
    DmlConfig,
    FflConfig,
    KdclConfig,
    OkddipConfig,
    OneConfig,
    OptimConfig,
    PclConfig,
    TrainConfig,
)
from pcl_fast.config_file import differences, flatten, from_dict, to_dict
from pcl_fast.device import resolve
from pcl_fast.errors import ConfigError, PclError
from pcl_fast.presets import find_preset, preset_names

NAN = float("nan")

WITHOUT_MEAN_TEACHERS = partial(PclConfig, mean_teacher=False)
# (what is built, the field, a bad value, the flag, a part of the fix)
RULES: list[tuple[Callable[..., Any], str, Any, str, str]] = [
    (DataConfig, "subset", 0, "--data.subset 0", "at least 1 image"),
    (DataConfig, "subset", -5, "--data.subset -5", "at least 1 image"),
    (DataConfig, "num_classes", 0, "--data.num-classes 0", "at least 1"),
    (DataConfig, "image_size", 0, "--data.image-size 0", "at least 1"),
    (DataConfig, "workers", -1, "--data.workers -1", "at least 0"),
    (DataConfig, "window_pages", 0, "--data.window-pages 0", "at least 1"),
    (PclConfig, "num_peers", 0, "--pcl.num-peers 0", "1 to 8"),
    (PclConfig, "num_peers", 9, "--pcl.num-peers 9", "1 to 8"),
    (PclConfig, "temperature", 0.0, "--pcl.temperature 0.0", "positive number"),
    (PclConfig, "temperature", NAN, "--pcl.temperature nan", "positive number"),
    (PclConfig, "distill_weight", -0.1, "--pcl.distill-weight -0.1", "0 or more"),
    (PclConfig, "rampup_epochs", -1.0, "--pcl.rampup-epochs -1.0", "0 (no ramp-up) or more"),
    (PclConfig, "rampup_share", 1.1, "--pcl.rampup-share 1.1", "a share, 0 to 1"),
    (PclConfig, "rampup_share", -0.1, "--pcl.rampup-share -0.1", "a share, 0 to 1"),
    (WITHOUT_MEAN_TEACHERS, "mutual_learning", True, "--pcl.mutual-learning True", "leave out"),
    (PclConfig, "ema_decay", 1.0, "--pcl.ema-decay 1.0", "0 or more, below 1"),
    (PclConfig, "ema_decay", -0.1, "--pcl.ema-decay -0.1", "0 or more, below 1"),
    (OptimConfig, "lr", 0.0, "--optim.lr 0.0", "positive number"),
    (OptimConfig, "lr", NAN, "--optim.lr nan", "positive number"),
    (OptimConfig, "momentum", 1.0, "--optim.momentum 1.0", "0 or more, below 1"),
    (OptimConfig, "momentum", -0.1, "--optim.momentum -0.1", "0 or more, below 1"),
    (OptimConfig, "weight_decay", -1e-4, "--optim.weight-decay -0.0001", "0 or more"),
    (OptimConfig, "gamma", 0.0, "--optim.gamma 0.0", "positive number"),
    (OptimConfig, "milestones", (0.75, 0.5), "--optim.milestones (0.75, 0.5)", "rising shares"),
    (OptimConfig, "milestones", (0.0, 0.5), "--optim.milestones (0.0, 0.5)", "epoch 150 of 300 is 0.5"),
    (OptimConfig, "milestones", (150, 225), "--optim.milestones (150, 225)", "epoch 150 of 300 is 0.5"),
    (OptimConfig, "momentum", 0.0, "--optim.nesterov True", "needs --optim.momentum above 0"),
    (TrainConfig, "epochs", 0, "--train.epochs 0", "at least 1"),
    (TrainConfig, "batch_size", 0, "--train.batch-size 0", "at least 1"),
    (TrainConfig, "eval_batch_size", 0, "--train.eval-batch-size 0", "at least 1"),
    (TrainConfig, "eval_every", 0, "--train.eval-every 0", "at least 1"),
    (TrainConfig, "save_every", 0, "--train.save-every 0", "at least 1"),
    (TrainConfig, "log_every", -1, "--train.log-every -1", "at least 1"),
    (TrainConfig, "skip_spikes", 1.0, "--train.skip-spikes 1.0", "above 1, or 0"),
    (TrainConfig, "skip_at_most", 0, "--train.skip-at-most 0", "at least 1"),
    (TrainConfig, "label_smoothing", -0.1, "--train.label-smoothing -0.1", "0 or more, below 1"),
    (TrainConfig, "label_smoothing", 1.0, "--train.label-smoothing 1.0", "0 or more, below 1"),
    (TrainConfig, "label_smoothing", NAN, "--train.label-smoothing nan", "0 or more, below 1"),
    (TrainConfig, "mixup", -0.2, "--train.mixup -0.2", "0 (off) or a positive number, as 0.2"),
    (TrainConfig, "mixup", float("inf"), "--train.mixup inf", "0 (off) or a positive number, as 0.2"),
    (DataConfig, "cutout", -1, "--data.cutout -1", "0 (off) to 32 pixels"),
    (DataConfig, "cutout", 33, "--data.cutout 33", "0 (off) to 32 pixels"),
    (DataConfig, "color_jitter", 1.5, "--data.color-jitter 1.5", "a share, 0 (off) to 1"),
    (DataConfig, "color_jitter", NAN, "--data.color-jitter nan", "a share, 0 (off) to 1"),
    (DataConfig, "resize_from", 100, "--data.resize-from 100", "multiple of 32"),
    (DataConfig, "resize_from", 64, "--data.resize-from 64", "at most 32"),
    (DataConfig, "resize_until", 0.0, "--data.resize-until 0.0", "a share"),
    (OptimConfig, "lr_batch", 0, "--optim.lr-batch 0", "at least 1"),
    (OptimConfig, "warmup_epochs", -1.0, "--optim.warmup-epochs -1.0", "0 or more"),
    (DistConfig, "timeout", 0.0, "--dist.timeout 0.0", "positive number of seconds"),
    (DmlConfig, "num_peers", 1, "--dml.num-peers 1", "2 to 8"),
    (DmlConfig, "temperature", 0.0, "--dml.temperature 0.0", "positive number"),
    (DmlConfig, "weight", -1.0, "--dml.weight -1.0", "0 or more"),
    (ClConfig, "num_heads", 9, "--cl.num-heads 9", "2 to 8"),
    (ClConfig, "beta", 0.0, "--cl.beta 0.0", "a share above 0, up to 1"),
    (ClConfig, "beta", 1.1, "--cl.beta 1.1", "a share above 0, up to 1"),
    (ClConfig, "temperature", NAN, "--cl.temperature nan", "positive number"),
    (OneConfig, "num_peers", 1, "--one.num-peers 1", "2 to 8"),
    (OneConfig, "temperature", -3.0, "--one.temperature -3.0", "positive number"),
    (OkddipConfig, "num_peers", 8, "--okddip.num-peers 8", "2 to 7"),
    (OkddipConfig, "num_peers", 1, "--okddip.num-peers 1", "2 to 7"),
    (OkddipConfig, "temperature", 0.0, "--okddip.temperature 0.0", "positive number"),
    (FflConfig, "num_peers", 1, "--ffl.num-peers 1", "2 to 8"),
    (FflConfig, "temperature", NAN, "--ffl.temperature nan", "positive number"),
    (FflConfig, "fusion_weight_decay", -1e-5, "--ffl.fusion-weight-decay -1e-05", "0 or more"),
    (KdclConfig, "num_peers", 1, "--kdcl.num-peers 1", "2 to 8"),
    (KdclConfig, "temperature", 0.0, "--kdcl.temperature 0.0", "positive number"),
    (KdclConfig, "weight", NAN, "--kdcl.weight nan", "0 or more"),
    (Config, "ranks", 0, "--ranks 0", "at least 1"),
    (Config, "seed", -1, "--seed -1", "0 to 4294967295"),
    (Config, "seed", 2**32, "--seed 4294967296", "0 to 4294967295"),
]


@pytest.mark.parametrize(("kind", "field", "value", "flag", "fix"), RULES)
def test_a_bad_value_is_refused_with_its_flag_and_the_fix(
    kind: Callable[..., Any], field: str, value: Any, flag: str, fix: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        kind(**{field: value})
    message = str(caught.value)
    assert message.startswith(f"{flag}: ")
    assert fix in message.removeprefix(flag)
    assert "\n" not in message
    assert caught.value.exit_code == 2
    assert isinstance(caught.value, (PclError, ValueError))


def test_values_at_the_edge_are_taken() -> None:
    least = PclConfig(num_peers=1, distill_weight=0.0, rampup_epochs=0.0, rampup_share=0.0, ema_decay=0.0)
    assert (least.num_peers, least.distill_weight, least.rampup_epochs) == (1, 0.0, 0.0)
    assert (least.rampup_share, least.ema_decay) == (0.0, 0.0)
    most = PclConfig(num_peers=8, rampup_share=1.0, temperature=1e-3)
    assert (most.num_peers, most.rampup_share, most.temperature) == (8, 1.0, 1e-3)
    optim = OptimConfig(momentum=0.0, nesterov=False, weight_decay=0.0, milestones=())
    assert (optim.momentum, optim.weight_decay, optim.milestones) == (0.0, 0.0, ())
    ones = {
        "epochs",
        "batch_size",
        "eval_batch_size",
        "eval_every",
        "save_every",
        "save_seconds",
        "log_every",
        "skip_at_most",
    }
    assert TrainConfig(skip_spikes=0.0, save_steps=0) == TrainConfig()
    assert set(dataclasses.asdict(TrainConfig(**dict.fromkeys(ones, 1))).values()) == {0, 1}
    config = Config(seed=2**32 - 1, data=DataConfig(subset=1, workers=0))
    assert (config.seed, config.data.subset, config.data.workers) == (2**32 - 1, 1, 0)


def test_classes_and_size_are_those_given_or_the_data_sets() -> None:
    assert (DataConfig().classes, DataConfig().pixels) == (10, 32)
    assert (DataConfig(dataset="imagenet").classes, DataConfig(dataset="imagenet").pixels) == (1000, 224)
    given = DataConfig(dataset="imagenet", num_classes=18, image_size=96)
    assert (given.classes, given.pixels) == (18, 96)


def test_the_learning_rate_follows_the_global_batch_where_that_is_wanted() -> None:
    train = TrainConfig(batch_size=64)
    assert Config(train=train, ranks=8).global_batch == 512
    assert Config(train=train).global_batch == 64
    assert Config(train=train, ranks=8).initial_lr == 0.1
    scaled = Config(train=train, ranks=8, optim=OptimConfig(lr=0.1, lr_batch=256))
    assert scaled.initial_lr == pytest.approx(0.2, rel=1e-15)


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().pcl.temperature = 4.0  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_survives_a_file(name: str) -> None:
    preset = find_preset(name)
    given = dataclasses.replace(preset.config, device="cpu", run_dir=Path("some") / "where")
    paths = {name: Path("some") / name for name in ("root", "train", "val")}
    given = dataclasses.replace(given, data=dataclasses.replace(given.data, **paths))
    for config in (preset.config, given, resolve(given)):
        read = from_dict(json.loads(json.dumps(to_dict(config))))
        assert read == config
        assert isinstance(read.optim.milestones, tuple)


def test_a_file_may_leave_settings_out() -> None:
    config = from_dict({"seed": 3, "pcl": {"temperature": 4.0}})
    assert config == Config(seed=3, pcl=PclConfig(temperature=4.0))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sed": 1}, "config.json: unknown key 'sed'. Did you mean 'seed'?"),
        ({"optim": {"learning": 1}}, "config.json: optim: unknown key 'learning'."),
        (
            {"pcl": {"temperatur": 3}},
            "config.json: pcl: unknown key 'temperatur'. Did you mean 'temperature'?",
        ),
        ({"qqqqqqq": 1}, "config.json: unknown key 'qqqqqqq'."),
    ],
)
def test_an_unknown_key_is_named_with_its_nearest_neighbour(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_dict(values)
    assert str(caught.value).startswith(message)


def test_a_bad_value_in_a_file_is_refused_like_one_of_a_flag() -> None:
    with pytest.raises(ConfigError, match=r"^--pcl\.num-peers 12: "):
        from_dict({"pcl": {"num_peers": 12}})


def test_differences_say_what_was_and_what_is() -> None:
    old = Config()
    assert differences(old, Config(), frozenset()) == []
    new = Config(seed=7, optim=OptimConfig(milestones=(0.5,)), run_dir=Path("x"), pcl=PclConfig(num_peers=4))
    found = differences(old, new, frozenset({"run_dir"}))
    assert found == ["pcl.num_peers: 3 -> 4", "optim.milestones: [0.5, 0.75] -> [0.5]", "seed: 0 -> 7"]


def test_flat_keys_are_those_of_the_flags() -> None:
    flat = flatten(to_dict(Config()))
    assert flat["pcl.num_peers"] == 3
    assert flat["data.dataset"] == "cifar10"
    assert flat["seed"] == 0
    assert not any(isinstance(value, dict) for value in flat.values())
