"""What a run amounts to, by hand and against torch's counter of FLOPs."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pcl_fast.build import build_network
from pcl_fast.config import Config, DataConfig, PclConfig, TrainConfig
from pcl_fast.contract import HeadOutputs, HeadShapes, PeerHead, PeerParts
from pcl_fast.device import resolve
from pcl_fast.figures import run_figures
from pcl_fast.models.zoo import find_backbone
from pcl_fast.objectives import METHODS, make_objective
from pcl_fast.objectives.one import NativeEnsemble
from pcl_fast.presets import find_preset
from pcl_fast.profile.roofline import step_work

RESNET32 = resolve(dataclasses.replace(find_preset("cifar100-resnet32").config, device="cpu"))
FORWARD = 138_260_992  # 69.1 million multiply-adds
STEM = 2 * 16 * 27 * 32 * 32


def counted(module: nn.Module, images: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module.eval()(images)
    return counter.get_total_flops()


def test_resnet32_by_hand() -> None:
    """12 F for three peers (method and plan): 4 passes of 3 views, but no gradient of the images."""
    figures = run_figures(RESNET32)
    ensemble = 2 * 192 * 100
    assert figures.deployed_flops_per_image == FORWARD
    assert figures.train_flops_per_image == 12 * FORWARD - 3 * STEM + 3 * ensemble
    assert (figures.deployed_parameters, figures.trained_parameters) == (472_756, 1_212_384)
    assert (figures.steps_per_epoch, figures.total_steps) == (390, 117_000)
    assert figures.total_flops == figures.train_flops_per_image * 128 * 117_000
    assert figures.lr_drop_epochs == (150, 225)


def test_the_network_alone_is_three_forwards() -> None:
    figures = run_figures(dataclasses.replace(RESNET32, method="vanilla"))
    assert figures.train_flops_per_image == 3 * FORWARD - STEM
    assert figures.trained_parameters == figures.deployed_parameters == 472_756


@pytest.mark.parametrize(
    ("model", "split", "changes"),
    [
        ("densenet40_12", None, {"num_peers": 2}),
        ("resnet8", None, {"view_per_peer": False}),
        ("torchvision:mobilenet_v3_small", "features.9", {"num_peers": 2}),
    ],
)
def test_forward_and_parameters_are_the_network_s(
    model: str, split: str | None, changes: dict[str, Any]
) -> None:
    """The counter is torch's, on the network of all peers; backward is twice that, without the stem's."""
    pixels = 32 if split is None else 64
    config = resolve(
        Config(
            model=model,
            split=split,
            device="cpu",
            data=DataConfig(image_size=pixels),
            pcl=PclConfig(**changes),
            train=TrainConfig(epochs=2),
        )
    )
    objective = make_objective(config)
    network = build_network(config, objective)
    figures = run_figures(config)
    plain = find_backbone(model, split).build(10)
    stem = next(layer for layer in plain.modules() if isinstance(layer, nn.Conv2d))
    image = torch.zeros(1, 3, pixels, pixels)
    forward = counted(network, image.expand(objective.num_views, 1, 3, pixels, pixels))
    ensemble = 2 * sum(network.feature_dims) * 10
    no_gradient = objective.num_views * counted(stem, image)
    # the mean teachers do without the ensemble's classifier
    assert figures.train_flops_per_image == 4 * forward - ensemble - no_gradient
    assert figures.deployed_flops_per_image == counted(plain, image)
    assert figures.trained_parameters == sum(p.numel() for p in network.parameters())
    assert figures.deployed_parameters == sum(p.numel() for p in plain.parameters())


class Watchful(PeerHead):
    """A head of parameters of its own, without layers, that fx cannot follow: a decision by a value."""

    def __init__(self, shapes: HeadShapes) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(shapes.feature_dim, shapes.num_classes))

    def forward(self, parts: PeerParts) -> HeadOutputs:
        mean_BF = torch.stack(tuple(parts.features)).mean(0)
        return HeadOutputs(mean_BF @ self.weight if float(mean_BF.sum()) > -1e9 else mean_BF)


class Watched(NativeEnsemble):
    make_head = Watchful


@pytest.fixture
def _watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "watched", lambda config: Watched(config.one))


@pytest.mark.usefixtures("_watched")
@pytest.mark.parametrize(
    ("method", "model"), [*((name, "resnet8") for name in [*METHODS, "watched"]), ("ffl", "vgg16")]
)
def test_every_method_s_network_is_counted_whole(method: str, model: str) -> None:
    """Forward by torch's counter on all of it, head included; backward twice that, without the stems'."""
    config = resolve(Config(model=model, device="cpu", method=method, train=TrainConfig(epochs=2)))
    objective = make_objective(config)
    network = build_network(config, objective)
    figures, work = run_figures(config), step_work(config)
    plain = find_backbone(model).build(10)
    stem = next(layer for layer in plain.modules() if isinstance(layer, nn.Conv2d))
    image = torch.zeros(1, 3, 32, 32)
    forward = counted(network, image.expand(objective.num_views, 1, 3, 32, 32))
    stems = (objective.num_views if objective.shares_trunk else objective.num_peers) * counted(stem, image)
    told = 0
    if objective.uses_mean_teacher:
        assert isinstance(network.ensemble, nn.Linear)
        told = forward - 2 * network.ensemble.weight.numel()
    elif objective.uses_trained_teacher:
        told = counted(plain, image)
    assert figures.train_flops_per_image == 3 * forward - stems + told
    assert figures.train_flops_per_image * config.train.batch_size == work.flops
    assert figures.trained_parameters == sum(p.numel() for p in network.parameters()) == work.parameters
    assert figures.deployed_parameters == sum(p.numel() for p in plain.parameters())
    assert figures.deployed_flops_per_image == counted(plain, image)
    assert figures.views_per_image == objective.num_views


@pytest.mark.parametrize(("teacher_model", "size"), [(None, "resnet8"), ("resnet20", "resnet20")])
def test_a_teacher_to_be_trained_first_is_counted_as_what_it_will_be(
    teacher_model: str | None, size: str
) -> None:
    config = resolve(Config(model="resnet8", device="cpu", method="kd"))
    config = dataclasses.replace(config, kd=dataclasses.replace(config.kd, teacher_model=teacher_model))
    alone = run_figures(dataclasses.replace(config, method="vanilla")).train_flops_per_image
    told = counted(find_backbone(size).build(10), torch.zeros(1, 3, 32, 32))
    assert run_figures(config).train_flops_per_image == alone + told


@pytest.mark.parametrize("method", ["dml", "kdcl"])
def test_branches_cost_less_than_networks(method: str) -> None:
    config = dataclasses.replace(RESNET32, method=method)
    options = dataclasses.replace(getattr(config, method), separate=False)
    branches = run_figures(dataclasses.replace(config, **{method: options}))
    networks = run_figures(config)
    assert networks.trained_parameters == 3 * 472_756
    assert branches.trained_parameters == 1_193_084
    assert networks.train_flops_per_image == 3 * (3 * FORWARD - STEM)
    # views of their own go through the shared trunk, too
    assert (branches.train_flops_per_image < networks.train_flops_per_image) == (method == "dml")


@pytest.mark.parametrize(("drop_last", "steps"), [(True, 1251), (False, 1252)])
def test_several_ranks_take_fewer_steps_of_more_images(drop_last: bool, steps: int) -> None:
    """1,281,167 images are 1,251 batches of 1,024, and a rest."""
    preset = find_preset("imagenet-r18-node").config
    data = dataclasses.replace(preset.data, drop_last=drop_last)
    config = dataclasses.replace(preset, device="cpu", ranks=8, data=data)
    figures = run_figures(resolve(config))
    assert (figures.ranks, figures.rank_batch, figures.global_batch) == (8, 128, 1024)
    assert (figures.steps_per_epoch, figures.total_steps) == (steps, 90 * steps)
    assert figures.total_flops == figures.train_flops_per_image * 1024 * 90 * steps
