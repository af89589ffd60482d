"""The floor of a step: by hand, and against the figures of the published plan."""

import dataclasses
import functools
from typing import NamedTuple

import pytest

from pcl_fast.config import Config, PclConfig
from pcl_fast.device import resolve
from pcl_fast.models.network_operations import NetworkOperations, network_operations
from pcl_fast.models.operations import Operation
from pcl_fast.models.zoo import find_backbone
from pcl_fast.presets import find_preset
from pcl_fast.profile.ceilings import KNOWN, Ceilings
from pcl_fast.profile.roofline import Kernel, StepWork, step_floor, step_work
from pcl_fast.profile.traffic import TIERS, Tier

H200 = KNOWN["NVIDIA H200"]


class Planned(NamedTuple):
    """A row of the plan: for an image GFLOP and MB (ideal, fused, eager), for an epoch seconds, kernels."""

    gflop: float
    megabytes: tuple[float, float, float]
    epoch: tuple[float, float, float]
    kernels: tuple[int, int]


# Three peers, batch 128, 100 classes, bfloat16, an H200: ideal, fused, fused with kernels of 2.5 us at least;
# kernels with the trunk's views in turn, and as one batch.
CIFAR = {
    "resnet32": Planned(1.66, (19.8, 39.6, 56.7), (0.25, 0.48, 0.80), (1144, 646)),
    "resnet110": Planned(4.02, (148, 287, 418), (1.75, 3.37, 4.10), (3703, 2061)),
    "vgg16": Planned(7.52, (14.3, 32.1, 44.3), (0.62, 0.83, 0.92), (469, 247)),
    "densenet40_12": Planned(1.73, (39.5, 106, 148), (0.46, 1.24, 1.56), (1207, 669)),
    "wrn20_8": Planned(24.5, (82.5, 185, 253), (2.05, 3.24, 3.29), (733, 411)),
}
IMAGENET = {"resnet18": (14_400, 9_490), "resnet50": (4_690, 2_670), "resnext50": (4_200, 2_220)}
EPOCH = 391


@functools.cache
def network(model: str) -> NetworkOperations:
    cifar = model in CIFAR
    return network_operations(find_backbone(model), 100 if cifar else 1000, 32 if cifar else 224)


def work_of(model: str, batch: int, peers: int = 3) -> StepWork:
    """PCL of so many peers; of one: the network alone."""
    alone = peers == 1
    return StepWork(
        network=network(model),
        batch_size=batch,
        num_views=peers,
        num_peers=peers,
        ensemble=not alone,
        teacher="none" if alone else "train",
        width=2,
    )


def without_dense_traffic(work: StepWork) -> StepWork:
    """As the plan counts DenseNet: concatenations are free, and so are sums of gradients."""

    def kept(operations: tuple[Operation, ...]) -> tuple[Operation, ...]:
        return tuple(each for each in operations if each.kind not in ("fork", "concatenation"))

    found = work.network
    changed = dataclasses.replace(found, trunk=kept(found.trunk), branch=kept(found.branch))
    return dataclasses.replace(work, network=changed)


@pytest.mark.parametrize("model", CIFAR)
def test_cifar_agrees_with_the_plan(model: str) -> None:
    plan = CIFAR[model]
    large, work = work_of(model, 4096), work_of(model, 128)
    assert large.flops / 4096e9 == pytest.approx(plan.gflop, rel=0.004)
    if model == "densenet40_12":
        large, work = without_dense_traffic(large), without_dense_traffic(work)
    for tier, megabytes in zip(TIERS, plan.megabytes, strict=True):
        assert large.bytes(tier) / 4096e6 == pytest.approx(megabytes, rel=0.008)
    floor = step_floor(work, H200)
    seconds = [EPOCH * floor.seconds[tier] for tier in ("ideal", "fused")]
    assert seconds == pytest.approx(plan.epoch[:2], rel=0.01, abs=0.005)


@pytest.mark.parametrize("model", CIFAR)
def test_a_residual_takes_no_kernel_of_its_own(model: str) -> None:
    """The plan's rules say so, too, but its program counts one for each addition, forward and backward.

    Beyond that program: a kernel for the losses, three for the ensemble's classifier, and those of VGG's two
    ReLUs that no BatchNorm precedes.
    """
    plan, work = CIFAR[model], work_of(model, 128)
    trunk, branch = (
        sum(each.kind == "addition" for each in part) for part in (work.network.trunk, work.network.branch)
    )
    more = 4 + (3 * 3 * 2 if model == "vgg16" else 0)
    floor = step_floor(work, H200)
    assert floor.kernels["loop"] == plan.kernels[0] - 3 * (3 * trunk + 3 * branch) + more
    assert floor.kernels["batched"] == plan.kernels[1] - 3 * (trunk + 3 * branch) + more
    fewer = (plan.kernels[1] - floor.kernels["batched"]) * EPOCH * H200.kernel_seconds
    assert EPOCH * floor.graph_seconds["batched"] == pytest.approx(plan.epoch[2] - fewer, rel=0.04)


def test_what_the_plan_leaves_out_of_densenet() -> None:
    whole = work_of("densenet40_12", 4096)
    kept = without_dense_traffic(whole)
    more = {tier: whole.bytes(tier) / kept.bytes(tier) - 1 for tier in TIERS}
    assert more == pytest.approx({"ideal": 0.074, "fused": 0.027, "eager": 0.153}, abs=0.002)


@pytest.mark.parametrize("model", IMAGENET)
def test_imagenet_agrees_with_the_plan(model: str) -> None:
    floor = step_floor(work_of(model, 256), H200)
    rates = [256 / floor.seconds[tier] for tier in ("ideal", "fused")]
    assert rates == pytest.approx(IMAGENET[model], rel=0.008)


def test_the_yardstick() -> None:
    """7,940 images/s with ResNet-50 alone: 73 % of the fused floor, 25 % of the peak."""
    floor = step_floor(work_of("resnet50", 408, peers=1), H200)
    assert floor.share(408 / 7940) == pytest.approx(0.73, abs=0.005)
    assert floor.mfu(408 / 7940) == pytest.approx(0.25, abs=0.01)


def test_three_peers_over_three_networks() -> None:
    """By FLOPs 4 / 3, by bytes 1.36."""
    peers, alone = work_of("resnet32", 4096), work_of("resnet32", 4096, peers=1)
    assert peers.flops / (3 * alone.flops) == pytest.approx(4 / 3, rel=0.01)
    seconds = [step_floor(work, H200).seconds["fused"] for work in (peers, alone)]
    assert seconds[0] / (3 * seconds[1]) == pytest.approx(1.36, abs=0.01)


SLOW = Ceilings("slow", 1e3, 1e2, 0.5, "given")


def tiny(**changes: object) -> StepWork:
    """A stem of 100 FLOPs and its norm; a branch of one product with 10 weights: 8 elements each way."""
    stem = Operation(kind="product", flops=100, read=8, written=8, parameters=5, needs_gradient=False)
    norm = Operation(kind="norm", read=8, written=8, parameters=2)
    relu = Operation(kind="activation", read=8, written=8, rides=True)
    classifier = Operation(kind="product", flops=20, read=8, written=4, parameters=10)
    operations = NetworkOperations(
        trunk=(stem, norm, relu),
        branch=(classifier,),
        trunk_parameters=7,
        branch_parameters=10,
        feature_dim=8,
        num_classes=4,
    )
    work = StepWork(
        network=operations,
        batch_size=3,
        num_views=2,
        num_peers=2,
        ensemble=True,
        teacher="train",
        width=2,
    )
    return dataclasses.replace(work, **changes)


def as_pairs(work: StepWork, tier: Tier, trunk: str = "batched") -> list[tuple[float, float, int, int]]:
    kernels = work.kernels(tier, trunk)  # pyright: ignore[reportArgumentType]
    return [(each.flops, each.bytes, each.launches, each.times) for each in kernels]


def test_fused_kernels_by_hand() -> None:
    """The trunk's 2 * 3 rows at once; elements of 2 bytes, weights read in 2 and gradients written in 4."""
    trunk_parameters, ensemble = 7, 16 * 4 + 4
    parameters = trunk_parameters + 20 + ensemble
    assert tiny().parameters == parameters
    student = [
        (600, 6 * 32 + 10, 1, 1),  # stem
        (600, 6 * 32 + 20, 1, 1),  # its weights' gradient; the images' is not wanted
        (0, 6 * 16, 1, 1),  # statistics
        (0, 6 * 32, 1, 1),  # normalise, cut off
        (0, 6 * 32, 1, 1),  # the two sums of its backward
        (0, 6 * 48, 1, 1),
        (60, 3 * 24 + 20, 1, 2),  # the classifiers
        (60, 3 * 24 + 40, 1, 2),
        (60, 3 * 24 + 20, 1, 2),
        (3 * 128, 3 * 40 + 2 * ensemble, 1, 1),  # the ensemble's
        (3 * 128, 3 * 40 + 4 * ensemble, 1, 1),
        (3 * 128, 3 * 40 + 2 * ensemble, 1, 1),
    ]
    teacher = [student[0], student[2], student[3], student[6]]
    # 5 trained rows of 4 logits with their gradients, 2 of the mean teachers; a parameter moves 32 bytes
    last = [(0, 2 * 3 * 4 * (3 + 3 + 2), 1, 1), (0, 32 * parameters, 1, 1)]
    assert as_pairs(tiny(), "fused") == [*student, *teacher, *last]


def test_the_trunk_view_by_view() -> None:
    batched, loop = as_pairs(tiny(), "fused"), as_pairs(tiny(), "fused", "loop")
    assert loop[0] == (300, 3 * 32 + 10, 1, 2)
    assert [sum(flops * times for flops, _, _, times in each) for each in (batched, loop)] == [
        tiny().flops
    ] * 2
    assert tiny().launches("fused", "loop") == tiny().launches("fused") + 6 + 3


def test_a_kernel_takes_what_binds_it() -> None:
    assert Kernel(2000, 10, times=3).seconds(SLOW, 0.5) == 6
    assert Kernel(100, 150).seconds(SLOW, 0.5) == 1.5
    assert Kernel(100, 10, times=2).seconds(SLOW, 0.5) == 1
    assert Kernel(100, 10, launches=0).seconds(SLOW, 0.5) == 0.1


def test_the_floor_is_the_sum() -> None:
    floor = step_floor(tiny(), dataclasses.replace(SLOW, kernel_seconds=5.0))
    pairs = as_pairs(tiny(), "fused")
    assert floor.seconds["fused"] == pytest.approx(
        sum(times * max(flops / 1e3, moved / 1e2) for flops, moved, _, times in pairs)
    )
    assert floor.bytes["fused"] == sum(moved * times for _, moved, _, times in pairs)
    assert floor.flops == sum(flops * times for flops, _, _, times in pairs) == tiny().flops
    assert floor.seconds["ideal"] < floor.seconds["fused"] < floor.seconds["eager"]
    assert floor.seconds["fused"] < floor.graph_seconds["batched"] <= floor.graph_seconds["loop"]
    assert floor.share(2 * floor.seconds["fused"]) == 0.5
    assert floor.mfu(floor.flops / 1e3) == 1


def test_a_network_alone_has_no_averages_and_float32_no_copies() -> None:
    alone = tiny(num_views=1, num_peers=1, ensemble=False, teacher="none")
    assert alone.update("fused").bytes == 17 * (20 + 2)
    assert alone.loss().bytes == 2 * 3 * 4 * 2
    assert dataclasses.replace(alone, width=4).update("fused").bytes == 17 * 20
    assert tiny(width=4).update("fused").bytes == tiny().parameters * 28
    assert tiny().update("eager").bytes == tiny().parameters * 104


def test_mean_teachers_with_statistics_of_their_own_take_none() -> None:
    train, evaluation = as_pairs(tiny(), "fused"), as_pairs(tiny(teacher="eval"), "fused")
    assert len(train) == len(evaluation) + 1
    assert [each for each in train if train.count(each) > evaluation.count(each)] == [(0, 96, 1, 1)] * 2


def test_a_configuration_s_step() -> None:
    config = resolve(dataclasses.replace(find_preset("cifar100-resnet32").config, device="cpu"))
    bfloat = dataclasses.replace(config, amp=dataclasses.replace(config.amp, dtype="bfloat16"))
    assert step_work(bfloat) == work_of("resnet32", 128)
    alone = step_work(dataclasses.replace(bfloat, method="vanilla"))
    assert alone == work_of("resnet32", 128, peers=1)
    one_view = PclConfig(num_peers=4, view_per_peer=False, ema_bn="copy")
    other = step_work(dataclasses.replace(bfloat, pcl=one_view))
    assert (other.num_views, other.num_peers, other.teacher) == (1, 4, "eval")
    float32 = resolve(Config(device="cpu", model="resnet8", amp=type(config.amp)(dtype="float32")))
    assert step_work(float32).width == 4


def test_a_head_s_kernels_by_hand() -> None:
    """A product and its norm in the place of the linear classifier: once, for the images of a batch."""
    product = Operation(kind="product", flops=50, read=10, written=6, parameters=7)
    norm = Operation(kind="norm", read=6, written=6, parameters=3)
    work = tiny()
    headed = dataclasses.replace(work, network=dataclasses.replace(work.network, head=(product, norm)))
    assert headed.parameters == 7 + 20 + 10
    assert headed.flops - work.flops == 3 * 3 * (50 - 128)
    fewer, more = as_pairs(work, "fused"), as_pairs(headed, "fused")
    assert more[:9] == fewer[:9]
    assert more[9:16] == [
        (150, 6 * 16 + 14, 1, 1),
        (150, 6 * 16 + 28, 1, 1),  # the gradient of its weights
        (150, 6 * 16 + 14, 1, 1),
        (0, 6 * 6, 1, 1),  # statistics
        (0, 6 * 12, 1, 1),
        (0, 6 * 12, 1, 1),
        (0, 6 * 18, 1, 1),
    ]
    assert more[16:-1] == fewer[12:-1]


def test_a_trained_teacher_is_run_and_not_averaged() -> None:
    told = Operation(kind="product", flops=90, read=8, written=4, parameters=40)
    alone = tiny(num_views=1, num_peers=1, ensemble=False, teacher="none")
    taught = dataclasses.replace(alone, network=dataclasses.replace(alone.network, trained_teacher=(told,)))
    assert taught.flops - alone.flops == 3 * 90
    assert taught.parameters == alone.parameters
    assert taught.update("fused") == alone.update("fused")
    found = as_pairs(taught, "fused")
    assert [each for each in found if each not in as_pairs(alone, "fused")] == [(270, 3 * 24 + 80, 1, 1)]


@pytest.mark.parametrize(
    ("method", "over_all"),
    [
        ("dml", []),
        ("one", ["pass", "product", "norm"]),
        ("okddip", ["product", "product", "product"]),
        ("ffl", ["concatenation", "product", "norm", "product", "norm", "pass", "product"]),
    ],
)
def test_what_looks_at_all_peers(method: str, over_all: list[str]) -> None:
    """Operation by operation; what else there is moves logits of a few classes."""
    config = resolve(Config(device="cpu", model="resnet8", method=method))
    kinds = [each.kind for each in step_work(config).over_all]
    left = iter(kinds)
    assert all(kind in left for kind in over_all), kinds
    assert kinds.count("product") == over_all.count("product")
    assert kinds.count("norm") == over_all.count("norm")
