"""The backbones by name: ours, and any of torchvision or timm with the module at which to cut."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Literal, NoReturn

from torch import nn

from pcl_fast.errors import ConfigError, did_you_mean
from pcl_fast.models import cifar, imagenet

Family = Literal["cifar", "imagenet"]


@dataclass(frozen=True)
class Backbone:
    """A network and how it is cut: trunk | branch from module `split` on | classifier.

    `build(num_classes)` draws new random weights each time. `image_size` is the height and width, in
    pixels, of the images it is meant for. `features_at` names the module whose input is the feature
    vector; None: the last nn.Linear.
    """

    name: str
    build: Callable[[int], nn.Module]
    split: str
    image_size: int
    family: Family
    features_at: str | None = None


def _cifar(build: Callable[[int], nn.Module], split: str, features_at: str | None = None) -> Backbone:
    return Backbone(build.__name__, build, split, 32, "cifar", features_at)


def _imagenet(build: Callable[[int], nn.Module]) -> Backbone:
    return Backbone(build.__name__, build, "layer3", 224, "imagenet")


OURS = {
    backbone.name: backbone
    for backbone in (
        _cifar(cifar.resnet8, "stage3"),
        _cifar(cifar.resnet20, "stage3"),
        _cifar(cifar.resnet32, "stage3"),
        _cifar(cifar.resnet110, "stage3"),
        _cifar(cifar.resnet110_basic, "stage3"),
        _cifar(cifar.wrn20_8, "stage3"),
        _cifar(cifar.vgg16, "stage5", features_at="head"),
        _cifar(cifar.densenet40_12, "block3"),
        _imagenet(imagenet.resnet18),
        _imagenet(imagenet.resnet50),
        _imagenet(imagenet.resnext50),
    )
}


def find_backbone(spec: str, split: str | None = None) -> Backbone:
    """The backbone called `spec`: one of our names, `torchvision:NAME` or `timm:NAME`.

    `split` names the module the branches begin with; ours have a default, the others need it. Raises
    ConfigError for an unknown name, a missing split or a missing timm.
    """
    library, colon, name = spec.partition(":")
    if colon:
        builders = {"torchvision": _from_torchvision, "timm": _from_timm}
        if library not in builders:
            raise ConfigError(
                f"backbone '{spec}': no library '{library}'; use torchvision:NAME or timm:NAME."
            )
        build = builders[library](name)
        return Backbone(spec, build, split or _ask_for_split(spec, build), 224, "imagenet")
    if spec not in OURS:
        raise ConfigError(
            f"backbone '{spec}' is unknown.{did_you_mean(spec, OURS)} Use one of {', '.join(OURS)},"
            " torchvision:NAME or timm:NAME."
        )
    ours = OURS[spec]
    if split is None or split == ours.split:
        return ours
    return replace(ours, split=split)


def _from_torchvision(name: str) -> Callable[[int], nn.Module]:
    import torchvision

    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise ConfigError(f"backbone 'torchvision:{name}' is unknown.{did_you_mean(name, known)}")
    return lambda num_classes: torchvision.models.get_model(name, weights=None, num_classes=num_classes)


def _from_timm(name: str) -> Callable[[int], nn.Module]:
    if find_spec("timm") is None:
        raise ConfigError(f"backbone 'timm:{name}' needs the package timm; install it with: pip install timm")
    import timm

    known = timm.list_models()
    if name not in known:
        raise ConfigError(f"backbone 'timm:{name}' is unknown.{did_you_mean(name, known)}")
    return lambda num_classes: timm.create_model(name, pretrained=False, num_classes=num_classes)


def _ask_for_split(spec: str, build: Callable[[int], nn.Module]) -> NoReturn:
    names = ", ".join(name for name, _ in build(2).named_children())
    raise ConfigError(
        f"backbone '{spec}' needs --split, the module its branches begin with; candidates: {names}."
    )
