"""Sizes of the backbones against the paper's table, their outputs, and finding them by name."""

import math
from importlib.util import find_spec

import pytest
import torch
from torch import nn

from pcl_fast.errors import ConfigError
from pcl_fast.models import cifar, imagenet, zoo
from pcl_fast.models.zoo import Backbone, find_backbone

# (backbone, parameters with 10 classes, with 100, the same in millions as the table prints them)
CIFAR_SIZES = [
    (cifar.resnet8, 78_042, 83_892, None, None),
    (cifar.resnet20, 272_474, 278_324, None, None),
    (cifar.resnet32, 466_906, 472_756, "0.467", "0.473"),
    (cifar.resnet110, 1_147_738, 1_170_868, "1.148", "1.171"),
    (cifar.resnet110_basic, 1_730_714, 1_736_564, "1.73", None),
    (cifar.wrn20_8, 6_848_090, 6_871_220, "6.848", "6.871"),
    (cifar.vgg16, 15_249_354, 15_295_524, "15.25", "15.30"),
    (cifar.densenet40_12, 176_122, 188_092, "0.176", "0.188"),
]
IMAGENET_SIZES = [
    (imagenet.resnet18, 11_689_512, "11.7"),
    (imagenet.resnet50, 25_557_032, "25.6"),
    (imagenet.resnext50, 25_028_904, "25.0"),
]


def count_parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def in_millions(count: int, printed: str) -> str:
    """The count with as many decimals as the printed figure."""
    return f"{count / 1e6:.{len(printed.split('.')[1])}f}"


@pytest.mark.parametrize(("build", "of_10", "of_100", "printed_10", "printed_100"), CIFAR_SIZES)
def test_cifar_backbones_have_the_papers_size(build, of_10, of_100, printed_10, printed_100):
    with torch.device("meta"):
        assert count_parameters(build(10)) == of_10
        assert count_parameters(build(100)) == of_100
    for count, printed in ((of_10, printed_10), (of_100, printed_100)):
        assert printed is None or in_millions(count, printed) == printed


@pytest.mark.parametrize(("build", "of_1000", "printed"), IMAGENET_SIZES)
def test_imagenet_backbones_have_torchvisions_size(build, of_1000, printed):
    with torch.device("meta"):
        assert count_parameters(build(1000)) == of_1000
    assert in_millions(of_1000, printed) == printed


@pytest.mark.parametrize("build", [entry[0] for entry in CIFAR_SIZES])
def test_cifar_backbones_halve_the_image_twice_and_give_logits(build):
    with torch.device("meta"):
        network, images = build(7), torch.empty(2, 3, 32, 32)
    maps = {}
    for name, stage in network.named_children():
        stage.register_forward_hook(lambda _m, _i, out, name=name: maps.update({name: out.shape}))
    assert network(images).shape == (2, 7)
    if "block3" in maps:
        assert maps["block3"] == (2, 132, 8, 8)
    elif "stage5" in maps:
        assert [maps[f"stage{n}"][-1] for n in range(1, 6)] == [16, 8, 4, 2, 1]
    else:
        assert [maps[f"stage{n}"][-1] for n in range(1, 4)] == [32, 16, 8]


def test_convolutions_start_with_variance_two_over_fan_out():
    network = cifar.resnet32(10)
    conv = network.get_submodule("stage3.4.body.0")
    assert isinstance(conv, nn.Conv2d)
    expected = math.sqrt(2 / (64 * 9))
    error_of_std = expected / math.sqrt(2 * conv.weight.numel())
    assert abs(conv.weight.std().item() - expected) < 5 * error_of_std
    for norm in (layer for layer in network.modules() if isinstance(layer, nn.BatchNorm2d)):
        assert torch.equal(norm.weight, torch.ones_like(norm.weight))
        assert not norm.bias.any()


def test_default_splits_follow_the_paper():
    splits = {name: backbone.split for name, backbone in zoo.OURS.items()}
    assert splits.pop("vgg16") == "stage5"
    assert splits.pop("densenet40_12") == "block3"
    assert {splits.pop(name) for name in ("resnet18", "resnet50", "resnext50")} == {"layer3"}
    assert set(splits.values()) == {"stage3"}
    assert find_backbone("resnet32", "stage2").split == "stage2"
    assert find_backbone("resnet18").image_size == 224


def test_each_build_draws_new_weights():
    backbone = find_backbone("resnet8")
    first, second = (dict(backbone.build(3).named_parameters()) for _ in range(2))
    assert not torch.equal(first["stem.0.weight"], second["stem.0.weight"])


def test_torchvision_and_timm_networks_are_found_by_name():
    backbone = find_backbone("torchvision:mobilenet_v3_small", "features.7")
    assert isinstance(backbone, Backbone)
    assert backbone.family == "imagenet"
    with torch.device("meta"):
        assert backbone.build(5)(torch.empty(2, 3, 64, 64)).shape == (2, 5)
    if find_spec("timm") is None:
        pytest.skip("timm is not installed")
    with torch.device("meta"):
        assert find_backbone("timm:resnet10t", "layer3").build(6)(torch.empty(2, 3, 64, 64)).shape == (2, 6)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("resnet33", "Did you mean 'resnet32'"),
        ("torchvision:mobilenet_v4", "Did you mean 'mobilenet_v2'"),
        ("keras:resnet18", "no library 'keras'"),
        ("torchvision:resnet34", "candidates: conv1, bn1, relu, maxpool, layer1, layer2, layer3, layer4"),
    ],
)
def test_what_cannot_be_found_is_explained(spec, said):
    with pytest.raises(ConfigError, match=said):
        find_backbone(spec)


def test_missing_timm_is_named_with_its_install_line(monkeypatch):
    monkeypatch.setattr(zoo, "find_spec", lambda _name: None)
    with pytest.raises(ConfigError, match="pip install timm"):
        find_backbone("timm:resnet18", "layer3")
