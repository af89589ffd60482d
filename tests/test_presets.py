"""The presets: their names, what each expands to, and that every one names a network that exists."""

import dataclasses
import inspect

import pytest
import torch

from pcl_fast import presets
from pcl_fast.build import build_network
from pcl_fast.config import NUM_CLASSES, Config
from pcl_fast.device import resolve
from pcl_fast.errors import ConfigError
from pcl_fast.models.zoo import find_backbone
from pcl_fast.objectives import make_objective
from pcl_fast.presets import find_preset, preset_names
from pcl_fast.schedules import milestone_epoch

NETWORKS = ("resnet32", "resnet110", "vgg16", "densenet40_12", "wrn20_8")
ROWS = [f"{data}-{net.replace('_', '-')}" for data in ("cifar10", "cifar100") for net in NETWORKS]
ROWS += ["imagenet-r18", "imagenet-r50", "imagenet-rx50"]
NODES = ["imagenet-r18-node", "imagenet-r50-node"]
COMPARISONS = ["demo", "gain"]


def test_every_row_of_the_paper_has_a_preset_and_a_twin() -> None:
    rows = [*ROWS, *NODES]
    assert set(preset_names()) == {*rows, *(f"{row}-vanilla" for row in rows), *COMPARISONS}
    assert len(preset_names()) == len(set(preset_names()))


@pytest.mark.parametrize("row", [*ROWS, *NODES])
def test_a_twin_is_the_same_run_of_the_network_alone(row: str) -> None:
    ours, alone = find_preset(row), find_preset(f"{row}-vanilla")
    assert (ours.config.method, alone.config.method) == ("pcl", "vanilla")
    assert dataclasses.replace(alone.config, method="pcl") == ours.config
    assert not ours.is_comparison
    assert ours.runs(ours.config) == [ours.config]
    assert alone.runs(alone.config) == [alone.config]
    assert ours.about.strip()


@pytest.mark.parametrize("row", ROWS)
def test_a_row_trains_the_network_and_the_data_of_its_name(row: str) -> None:
    config = find_preset(row).config
    data, _, network = row.partition("-")
    assert config.data.dataset == data
    short = {"r18": "resnet18", "r50": "resnet50", "rx50": "resnext50"}
    assert config.model == short.get(network, network.replace("-", "_"))
    assert config.data.subset is None
    assert (config.pcl.num_peers, config.pcl.temperature, config.pcl.ema_decay) == (3, 3.0, 0.999)
    epochs = config.train.epochs
    falls = [milestone_epoch(share, epochs) for share in config.optim.milestones]
    recipe = (epochs, falls, config.train.batch_size, config.optim.lr, config.optim.weight_decay)
    expected = (90, [30, 60], 256, 0.1, 1e-4) if data == "imagenet" else (300, [150, 225], 128, 0.1, 5e-4)
    assert recipe == expected
    alpha = resolve(dataclasses.replace(config, device="cpu")).pcl.rampup_epochs
    assert alpha == (20.0 if data == "imagenet" else 80.0)


@pytest.mark.parametrize("row", ROWS)
def test_a_row_on_several_gpus_scales_only_where_that_is_the_recipe(row: str) -> None:
    """ImageNet: 0.1 for 256 images, so 0.8 for 8 GPUs of them. CIFAR's rate is for the batch it has."""
    config = dataclasses.replace(find_preset(row).config, ranks=8)
    assert config.initial_lr == pytest.approx(0.8 if row.startswith("imagenet") else 0.1, rel=1e-15)
    assert find_preset(row).config.initial_lr == 0.1
    assert (config.optim.warmup_epochs, config.data.resize_from, config.sync_bn) == (0.0, None, False)


@pytest.mark.parametrize("row", NODES)
def test_a_node_trains_the_paper_s_network_on_more_images_at_once(row: str) -> None:
    config, faithful = find_preset(row).config, find_preset(row.removesuffix("-node")).config
    node = dataclasses.replace(config, ranks=8)
    assert (node.global_batch, node.train.epochs) == (1024, 90)
    assert node.initial_lr == pytest.approx(0.4, rel=1e-15)
    same = dataclasses.replace(
        config,
        optim=dataclasses.replace(config.optim, warmup_epochs=0.0),
        train=dataclasses.replace(config.train, batch_size=256),
    )
    assert same == faithful
    assert config.optim.warmup_epochs == 5
    smaller = dataclasses.replace(config, data=dataclasses.replace(config.data, resize_from=160))
    assert resolve(dataclasses.replace(smaller, device="cpu")).data.resize_from == 160, "as the text says"


def test_a_comparison_is_every_method_with_every_seed() -> None:
    gain = find_preset("gain")
    assert gain.is_comparison
    runs = gain.runs(dataclasses.replace(gain.config, seed=5))
    assert [(run.method, run.seed) for run in runs] == [
        ("vanilla", 5),
        ("pcl", 5),
        ("vanilla", 6),
        ("pcl", 6),
        ("vanilla", 7),
        ("pcl", 7),
    ]
    for run in runs:
        assert dataclasses.replace(run, method="pcl", seed=0) == gain.config
    assert [(run.method, run.seed) for run in find_preset("demo").runs(Config())] == [
        ("vanilla", 0),
        ("pcl", 0),
    ]


@pytest.mark.parametrize("name", COMPARISONS)
def test_short_runs_keep_their_share_of_the_recipe(name: str) -> None:
    """The EMA forgets over the same share of the run as 1,000 of 300 x 390 steps."""
    config = find_preset(name).config
    assert config.data.subset is not None
    steps = config.train.epochs * (config.data.subset // config.train.batch_size)
    horizon = 1 / (1 - config.pcl.ema_decay)
    assert horizon / steps == pytest.approx(1000 / (300 * 390), rel=0.03)
    alpha = resolve(dataclasses.replace(config, device="cpu")).pcl.rampup_epochs
    assert alpha == pytest.approx(config.train.epochs * 80 / 300, abs=1e-5)
    assert config.optim.milestones == (0.5, 0.75)
    assert config.train.epochs % config.train.eval_every == 0


def test_a_short_run_by_hand() -> None:
    """40 epochs of 78 steps: 3,120 steps, a horizon of 26.67 steps, phi at most 1 - 1/26.67."""
    assert find_preset("gain").config.pcl.ema_decay == 0.9625


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cifar100-resnet23", "unknown preset 'cifar100-resnet23'. Did you mean 'cifar100-resnet32'?"),
        ("cifar10_resnet32", "unknown preset 'cifar10_resnet32'. Did you mean 'cifar10-resnet32'?"),
        ("zzz", "unknown preset 'zzz'. There are: demo, gain, cifar10-resnet32"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(name: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        find_preset(name)
    assert str(caught.value).startswith(message)


def test_names_are_those_of_the_functions() -> None:
    for name in preset_names():
        function = getattr(presets, name.removesuffix("-vanilla").replace("-", "_"))
        assert inspect.isfunction(function)
        assert find_preset(name).about == function.__doc__


def networks_of_presets() -> list[tuple[str, str]]:
    """Every model with every data set that a preset trains it on."""
    configs = [find_preset(name).config for name in preset_names()]
    return sorted({(config.model, config.data.dataset) for config in configs})


@pytest.mark.parametrize(("model", "dataset"), networks_of_presets())
def test_every_preset_names_a_network_for_its_images(model: str, dataset: str) -> None:
    backbone = find_backbone(model)
    assert backbone.family == ("imagenet" if dataset == "imagenet" else "cifar")
    assert backbone.image_size == (224 if dataset == "imagenet" else 32)


@pytest.mark.parametrize("name", ["demo", "cifar100-densenet40-12", "cifar10-resnet32-vanilla"])
def test_a_preset_builds_its_network(name: str) -> None:
    config = resolve(dataclasses.replace(find_preset(name).config, device="cpu"))
    objective = make_objective(config)
    with torch.device("meta"):
        network = build_network(config, objective)
    assert network.num_classes == NUM_CLASSES[config.data.dataset]
    assert network.num_peers == (1 if config.method == "vanilla" else 3)
    assert (network.ensemble is None) == (config.method == "vanilla")
