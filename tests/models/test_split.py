"""The three parts against the network they were cut from, and what cannot be cut."""

import copy
from importlib.util import find_spec

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pcl_fast.errors import ConfigError
from pcl_fast.models.split import split_network
from pcl_fast.models.zoo import OURS, find_backbone

OTHERS = [
    ("torchvision:resnet34", "layer3"),
    ("torchvision:vgg11_bn", "features.8"),
    ("torchvision:vgg11_bn", "features.10"),  # an in-place ReLU: the first thing behind the cut
    ("torchvision:mobilenet_v3_small", "features.7"),
    ("torchvision:densenet121", "features.denseblock4"),
    ("torchvision:efficientnet_b0", "features.5"),
    ("timm:mobilenetv3_small_050", "blocks.3"),
    ("timm:vit_tiny_patch16_224", "blocks.6"),  # optional arguments, a class token
    ("timm:regnety_002", "s3"),  # nn.Identity behind the classifier
]
CASES = [(name, backbone.split) for name, backbone in OURS.items()] + OTHERS


def build(spec: str, at: str):
    if spec.startswith("timm:") and find_spec("timm") is None:
        pytest.skip("timm is not installed")
    backbone = find_backbone(spec, at)
    if "vgg11" in spec:  # the large head says nothing here and takes seconds to draw
        with torch.device("meta"):
            network = backbone.build(10)
        network = network.to_empty(device="cpu")
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=0.02)
        for layer in network.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.reset_parameters()
        return backbone, network
    return backbone, backbone.build(10)


def parts_of(cut):
    return cut.trunk, cut.body, cut.classifier


@pytest.mark.parametrize(("spec", "at"), CASES)
def test_parts_together_are_the_network(spec, at):
    backbone, network = build(spec, at)
    network.eval()
    cut = split_network(network, backbone.split, backbone.features_at)
    size = 32 if backbone.family == "cifar" else 224 if "vit" in spec else 64
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        features = cut.body(cut.trunk(images))
        assert torch.equal(cut.classifier(features), network(images))
    assert features.shape == (2, cut.feature_dim)
    merged = {key: value for part in parts_of(cut) for key, value in part.state_dict().items()}
    plain = network.state_dict()
    assert sum(len(part.state_dict()) for part in parts_of(cut)) == len(plain)
    assert cut.keys == tuple(plain)
    assert merged.keys() == plain.keys()
    assert all(merged[key].data_ptr() == plain[key].data_ptr() for key in plain)


def test_the_cuts_lie_where_the_paper_has_them():
    def owners(part):
        return {name.split(".")[0] for name, _ in part.named_parameters()}

    cut = split_network(find_backbone("densenet40_12").build(10), "block3")
    assert owners(cut.trunk) == {"stem", "block1", "transition1", "block2", "transition2"}
    assert owners(cut.body) == {"block3", "norm"}
    vgg = find_backbone("vgg16")
    cut = split_network(vgg.build(10), vgg.split, vgg.features_at)
    assert owners(cut.trunk) == {"stage1", "stage2", "stage3", "stage4"}
    assert (owners(cut.body), owners(cut.classifier)) == ({"stage5"}, {"head", "classifier"})
    cut = split_network(find_backbone("resnet18").build(10), "layer3")
    assert owners(cut.body) == {"layer3", "layer4"}


def test_no_part_writes_on_its_input():
    """Peers share the trunk's output, or hold slices of it."""
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Identity(), nn.ReLU(True), nn.Flatten(), nn.Linear(16, 2))
    cut = split_network(network, "1")
    maps = cut.trunk(torch.randn(2, 3, 2, 2))
    before = maps.detach().clone()
    halves = maps.split(1)
    torch.cat([cut.body(half) for half in halves]).sum().backward()
    assert (before < 0).any()
    assert torch.equal(maps, before)


def test_modes_and_random_state_are_left_alone():
    network = find_backbone("resnet8").build(10)
    network.get_submodule("stage1").eval()
    modes = {name: module.training for name, module in network.named_modules()}
    state = torch.get_rng_state()
    split_network(network, "stage3")
    assert {name: module.training for name, module in network.named_modules()} == modes
    assert torch.equal(torch.get_rng_state(), state)


def test_parts_can_be_copied_converted_and_compiled():
    network = find_backbone("resnet8").build(10)
    trunk = split_network(network, "stage3").trunk
    twin = copy.deepcopy(trunk).to(memory_format=torch.channels_last)
    assert twin.get_parameter("stem.0.weight").is_contiguous(memory_format=torch.channels_last)
    assert trunk.get_parameter("stem.0.weight").is_contiguous()
    assert twin.state_dict().keys() == trunk.state_dict().keys()
    images = torch.randn(2, 3, 32, 32)
    out = twin(images.to(memory_format=torch.channels_last))
    assert out.is_contiguous(memory_format=torch.channels_last)
    expected = trunk(images)
    torch.testing.assert_close(out, expected)
    compiled = torch.compile(copy.deepcopy(trunk), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(images), expected)


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.middle = nn.Linear(4, 4)
        self.last = nn.Linear(4, 2)

    def forward(self, x):
        return self.last(self.middle(self.stem(x)))


class TwoStreams(Tiny):
    def forward(self, x):
        a = self.stem(x)
        b = F.relu(a)
        return self.last(self.middle(b) + a)


class Branching(Tiny):
    def forward(self, x):
        return super().forward(x if x.sum() > 0 else -x)


class DropoutFunction(Tiny):
    def forward(self, x):
        return self.last(self.middle(F.dropout(self.stem(x), 0.5, self.training)))


class NoFinalLinear(Tiny):
    def forward(self, x):
        return super().forward(x).softmax(1)


class Unused(Tiny):
    def forward(self, x):
        return self.last(self.stem(x))


class TwoInputs(Tiny):
    def forward(self, x, y):  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().forward(x + y)


class SharedLayer(Tiny):
    def forward(self, x):
        return self.last(self.stem(self.middle(self.stem(x))))


@pytest.mark.parametrize(
    ("kind", "at", "said"),
    [
        (Tiny, "midle", "no such module. Did you mean 'middle'"),
        (Tiny, "stem", "no trunk is left"),
        (TwoStreams, "middle", r"2 tensors cross it \(stem, relu\)"),
        (Branching, "middle", "Branching cannot be traced by torch.fx"),
        (DropoutFunction, "middle", "other things in train than in eval mode"),
        (NoFinalLinear, "middle", r"does not end in an nn.Linear \(it ends in 'softmax'\)"),
        (Unused, "last", "never uses 'middle.weight'"),
        (Unused, "middle", "never calls this module itself; choose one of: stem, last"),
        (TwoInputs, "middle", "takes 2 inputs"),
        (SharedLayer, "middle", "'stem.weight' is used on both sides"),
    ],
)
def test_what_cannot_be_cut_is_refused_in_one_line(kind, at, said):
    with pytest.raises(ConfigError, match=said) as refusal:
        split_network(kind(), at)
    assert "\n" not in str(refusal.value)


def test_a_trunk_may_reach_to_the_classifier_but_not_beyond():
    cut = split_network(Tiny(), "last")
    x = torch.randn(3, 4)
    assert torch.equal(cut.body(x), x)
    vgg = find_backbone("vgg16", "classifier")
    with torch.device("meta"):
        network = vgg.build(10)
    with pytest.raises(ConfigError, match="the features are taken before it"):
        split_network(network, vgg.split, vgg.features_at)
