"""What a run amounts to, by hand and against torch's counter of FLOPs."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pcl_fast.build import build_network
from pcl_fast.config import Config, DataConfig, PclConfig, TrainConfig
from pcl_fast.device import resolve
from pcl_fast.figures import run_figures
from pcl_fast.models.zoo import find_backbone
from pcl_fast.objectives import make_objective
from pcl_fast.presets import find_preset

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
    ensemble = 2 * objective.num_peers * network.feature_dim * 10
    no_gradient = objective.num_views * counted(stem, image)
    # the mean teachers do without the ensemble's classifier
    assert figures.train_flops_per_image == 4 * forward - ensemble - no_gradient
    assert figures.deployed_flops_per_image == counted(plain, image)
    assert figures.trained_parameters == sum(p.numel() for p in network.parameters())
    assert figures.deployed_parameters == sum(p.numel() for p in plain.parameters())


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
