"""Plans of runs on several GPUs: against closed forms, real networks and published figures."""

import dataclasses
import functools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pcl_fast.build import build_network, build_state
from pcl_fast.config import Config, PclConfig
from pcl_fast.device import resolve
from pcl_fast.errors import ConfigError
from pcl_fast.kernels.sgd_ema import SgdRule
from pcl_fast.models.view_norm import synchronise
from pcl_fast.objectives import make_objective
from pcl_fast.presets import find_preset
from pcl_fast.profile.ceilings import KNOWN
from pcl_fast.profile.plan.allreduce import LINK_REACHED, Cluster, Exchange, exchange_of, ring_seconds
from pcl_fast.profile.plan.basis import Basis, amount, duration
from pcl_fast.profile.plan.epoch import Images, Plan, forward_seconds
from pcl_fast.profile.plan.feed import Feed
from pcl_fast.profile.plan.gpus import GPUS, find_gpu, named_in
from pcl_fast.profile.plan.measured import StepTime
from pcl_fast.profile.plan.memory import activation_bytes, weight_bytes
from pcl_fast.profile.plan.rows import rows_of, sentence
from pcl_fast.profile.plan.step_time import projected_step
from pcl_fast.profile.roofline import StepWork, step_floor, step_work
from pcl_fast.step.arena import Arena

H200 = GPUS["h200"]


@functools.cache
def config_of(preset: str, dtype: str = "bfloat16") -> Config:
    config = dataclasses.replace(find_preset(preset).config, device="cpu")
    return resolve(dataclasses.replace(config, amp=dataclasses.replace(config.amp, dtype=dtype)))


@functools.cache
def work_of(preset: str) -> StepWork:
    return step_work(config_of(preset))


def cluster_of(gpus: int = 8, nodes: int = 1, cores: int = 96, network: float = 50e9) -> Cluster:
    return Cluster(gpu=H200, gpus=gpus, nodes=nodes, cores=cores, network=network)


def plan_of(
    preset: str = "imagenet-r18", share: float = 0.6, rate: float | None = 600.0, **cluster: Any
) -> Plan:
    work, machines = work_of(preset), cluster_of(**cluster)
    floor = step_floor(work, machines.gpu.ceilings_of(work.width))
    return Plan(
        config=dataclasses.replace(config_of(preset), ranks=machines.ranks),
        cluster=machines,
        work=work,
        floor=floor,
        step=projected_step(floor, share),
        feed=None if rate is None else Feed(rate, Basis("measured", "a test")),
        images=Images(train=1_281_167, val=50_000, stored=None, stored_basis=None),
    )


def ring(values_RN: np.ndarray) -> tuple[np.ndarray, int, int]:
    """A real ring: each rank passes a chunk on at each hop. The results, numbers a rank sent, and hops."""
    ranks = len(values_RN)
    chunks = [list(np.split(row.copy(), ranks)) for row in values_RN]
    sent = hops = 0
    for gather in (False, True):
        for hop in range(ranks - 1):
            passed = [(rank, (rank - hop + gather) % ranks) for rank in range(ranks)]
            moving = [chunks[rank][index].copy() for rank, index in passed]
            for (rank, index), chunk in zip(passed, moving, strict=True):
                right = chunks[(rank + 1) % ranks]
                right[index] = chunk if gather else right[index] + chunk
            sent, hops = sent + moving[0].size, hops + 1
    return np.stack([np.concatenate(each) for each in chunks]), sent, hops


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_a_ring_takes_what_its_links_carry(ranks: int) -> None:
    values = np.arange(ranks * 24.0).reshape(ranks, 24)
    reduced, sent, hops = ring(values)
    np.testing.assert_array_equal(reduced, np.tile(values.sum(0), (ranks, 1)))
    size, bandwidth, latency = 4 * 24, 1e3, 0.25
    assert ring_seconds(size, ranks, bandwidth, latency) == pytest.approx(
        4 * sent / bandwidth + hops * latency
    )


def test_the_slowest_link_binds() -> None:
    exchange = Exchange(gradients=9_000, statistics=800, synchronised=200, messages=3)
    inside, slow, fast = cluster_of(), cluster_of(nodes=2), cluster_of(nodes=2, network=1e12)
    assert (inside.bandwidth, fast.bandwidth) == (LINK_REACHED * 450e9,) * 2
    assert slow.bandwidth == LINK_REACHED * 50e9
    # 10,000 bytes, and the latencies of three messages
    expected = 2 * 15 / 16 * 10_000 / slow.bandwidth + 3 * 2 * 15 * slow.hop
    assert slow.seconds(exchange) == pytest.approx(expected)
    assert slow.hop > inside.hop
    assert cluster_of(gpus=1).seconds(exchange) == 0


class Messages:
    """Counts what it is asked to add up."""

    def __init__(self) -> None:
        self.calls = self.numbers = 0

    def __call__(self, tensor: Tensor) -> None:
        self.calls, self.numbers = self.calls + 1, self.numbers + tensor.numel()


@pytest.mark.parametrize("method", ["pcl", "vanilla"])
@pytest.mark.parametrize("reduce_dtype", ["float32", "bfloat16"])
def test_what_is_added_up_is_what_the_networks_have(method: Any, reduce_dtype: Any) -> None:
    config = resolve(Config(model="resnet8", device="cpu", method=method, sync_bn=True))
    config = dataclasses.replace(config, dist=dataclasses.replace(config.dist, reduce_dtype=reduce_dtype))
    found = exchange_of(step_work(config), config)
    objective = make_objective(config)
    networks = [build_network(config, objective).train() for _ in range(1 + objective.uses_mean_teacher)]
    weights = sum(weight.numel() for weight in networks[0].parameters())
    assert found.gradients == weights * (2 if reduce_dtype == "bfloat16" else 4)
    buffers = [buffer for network in networks for buffer in network.buffers() if buffer.is_floating_point()]
    assert found.statistics == 4 * sum(buffer.numel() for buffer in buffers)
    seen = Messages()
    for network in networks:
        synchronise(network, seen)
    views = torch.randn(objective.num_views, 2, 3, 16, 16)
    with torch.no_grad():
        for teacher in networks[1:]:
            teacher(views)
    student = networks[0](views)
    parts = (student.logits_VBC, student.ensemble_logits_BC)
    torch.stack([part.sum() for part in parts if part is not None]).sum().backward()
    assert found.messages == 2 + seen.calls
    # Each forward call also adds up one count.
    assert found.synchronised == pytest.approx(4 * seen.numbers, rel=0.02)
    alone = exchange_of(step_work(config), dataclasses.replace(config, sync_bn=False))
    assert (alone.messages, alone.synchronised) == (2, 0)


def test_weights_in_memory_are_the_arena_s() -> None:
    config = config_of("cifar10-resnet32")
    objective = make_objective(config)
    network, teacher = (build_network(config, objective) for _ in range(2))
    rule = SgdRule(momentum=0.9, weight_decay=0.0, nesterov=True)
    flat = Arena(network, teacher, rule, torch.bfloat16).buffers
    held = [getattr(flat, field.name) for field in dataclasses.fields(flat)]
    taken = sum(each.nbytes for each in held if each is not None)
    counted = weight_bytes(work_of("cifar10-resnet32"), travelling=0)
    assert counted <= taken <= 1.03 * counted  # aligned
    more = weight_bytes(work_of("cifar10-resnet32"), travelling=2) - counted
    assert more == 2 * work_of("cifar10-resnet32").parameters


def test_activations_are_near_what_autograd_keeps() -> None:
    """When each operation is one of torch's; a few maps that come and go are counted on top."""
    config = resolve(
        Config(model="resnet32", device="cpu", amp=dataclasses.replace(Config().amp, dtype="float32"))
    )
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=4), kernels="off")
    state = build_state(config)
    weights = {weight.untyped_storage().data_ptr() for weight in state.network.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        held.append(tensor)
        return tensor

    held: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = state.network(torch.randn(3, 4, 3, 32, 32))
    assert outputs.logits_VBC.requires_grad
    least = activation_bytes(step_work(config))
    assert 0.85 * sum(kept.values()) <= least <= 1.2 * sum(kept.values())


@pytest.mark.parametrize(("gpus", "nodes"), [(1, 1), (8, 1), (8, 4)])
def test_batches_steps_and_the_learning_rate(gpus: int, nodes: int) -> None:
    plan, ranks = plan_of(gpus=gpus, nodes=nodes), gpus * nodes
    assert plan.global_batch == 256 * ranks
    assert plan.steps_per_epoch == 1_281_167 // (256 * ranks)
    data = dataclasses.replace(plan.config.data, drop_last=False)
    whole = dataclasses.replace(plan, config=dataclasses.replace(plan.config, data=data))
    assert whole.steps_per_epoch == math.ceil(1_281_167 / (256 * ranks))
    optim = dataclasses.replace(plan.config.optim, lr=0.1, lr_batch=256)
    scaled = dataclasses.replace(plan, config=dataclasses.replace(plan.config, optim=optim))
    row = next(row for row in rows_of(scaled) if row.what == "learning rate")
    assert row.value == f"{0.1 * ranks:g} at the start"
    warm = dataclasses.replace(scaled.config, optim=dataclasses.replace(optim, warmup_epochs=5.0))
    row = next(
        row for row in rows_of(dataclasses.replace(scaled, config=warm)) if row.what == "learning rate"
    )
    assert row.value == f"{0.1 * ranks:g} after 5 epochs of warm-up"
    fixed = dataclasses.replace(plan.config, optim=dataclasses.replace(optim, lr_batch=None))
    row = next(row for row in rows_of(dataclasses.replace(plan, config=fixed)) if row.what == "learning rate")
    assert row.value.startswith("0.1 ")
    assert ("would make it" in row.basis.source) == (ranks > 1)


def test_a_batch_that_the_images_do_not_fill() -> None:
    images = Images(train=100, val=10, stored=None, stored_basis=None)
    with pytest.raises(ConfigError, match=r"--train\.batch-size 256 on 8 GPUs: 2,048 images a step are"):
        dataclasses.replace(plan_of(), images=images)


@pytest.mark.parametrize(
    ("preset", "rate", "minutes"), [("imagenet-r18", 6950, 35), ("imagenet-r50", 1950, 123)]
)
def test_eight_gpus_as_published(preset: str, rate: float, minutes: float) -> None:
    """With 73 % of the fused floor: images/s a GPU; minutes of 90 epochs, without the all-reduce."""
    plan = plan_of(preset, share=0.73, rate=None)
    assert 256 / plan.step.seconds == pytest.approx(rate, rel=0.01)
    computing = 90 * plan.steps_per_epoch * plan.step.seconds / 60
    assert computing == pytest.approx(minutes, rel=0.02)
    assert computing < 90 * plan.epoch_seconds / 60 < 1.05 * computing


def test_what_binds() -> None:
    plan = plan_of()
    assert plan.binds == "computing"
    assert plan.step_seconds == plan.step.seconds + plan.allreduce
    starved = plan_of(cores=24)
    assert starved.binds == "data"
    assert starved.epoch_seconds == pytest.approx(625 * 2048 / (16 * 600))
    assert starved.evaluation_seconds == pytest.approx(50_000 / (16 * 600))
    slow = plan_of(nodes=8, network=0.5e9)
    assert slow.binds == "the all-reduce"
    assert slow.step_seconds == slow.step.seconds + slow.allreduce > 2 * slow.step.seconds
    assert plan_of(cores=1).feeding_cores == 1
    data = dataclasses.replace(plan.config.data, workers=2)
    few = dataclasses.replace(plan, config=dataclasses.replace(plan.config, data=data))
    assert (few.feeding_cores, few.binds) == (16, "data")
    for each, verb in ((plan, "computing binds"), (starved, "data bind;"), (slow, "the all-reduce binds")):
        assert verb in sentence(each, "it")


def test_the_cores_that_are_needed_suffice() -> None:
    needed = plan_of().cores_needed
    assert plan_of(cores=needed).binds == "computing"
    assert plan_of(cores=needed - 1).binds == "data"
    row = next(row for row in rows_of(plan_of(cores=needed - 3)) if row.what == "cores needed")
    assert row.value == f"{needed} a node: 3 too few"


def test_the_network_that_is_needed_suffices() -> None:
    plan = plan_of(nodes=4)
    enough = plan_of(nodes=4, network=plan.network_needed)
    hops = 2 * 2 * 31 * enough.cluster.hop
    assert enough.allreduce - hops == pytest.approx(0.1 * enough.step.seconds)


def test_a_run_is_its_epochs_and_evaluations() -> None:
    plan = plan_of()
    train = dataclasses.replace(plan.config.train, epochs=10, eval_every=4)
    plan = dataclasses.replace(plan, config=dataclasses.replace(plan.config, train=train))
    assert plan.evaluations == 3
    assert plan.run_seconds == pytest.approx(10 * plan.epoch_seconds + 3 * plan.evaluation_seconds)
    assert plan_of(gpus=16, cores=400).evaluation_seconds < plan_of(gpus=8, cores=400).evaluation_seconds


def test_evaluating_runs_every_network_forward() -> None:
    """By FLOPs alone: one view through the trunk, each branch and the ensemble's classifier, twice."""
    work = work_of("imagenet-r18")
    ceilings = dataclasses.replace(H200.ceilings, bandwidth=1e30, kernel_seconds=0.0)
    floor = step_floor(work, ceilings)
    network = work.network
    once = sum(each.flops for each in network.trunk) + 3 * sum(each.flops for each in network.branch)
    once += 2 * 3 * network.feature_dim * network.num_classes
    assert forward_seconds(work, floor, 64) == pytest.approx(2 * once / ceilings.flops)


def test_gpus_by_their_names() -> None:
    assert named_in("NVIDIA H200") is H200
    assert named_in("NVIDIA A100-SXM4-80GB") is GPUS["a100"]
    assert named_in("NVIDIA GeForce RTX 4090") is None
    with pytest.raises(ConfigError, match=r"--gpu h20: no figures of such a GPU. Did you mean 'h200'"):
        find_gpu("h20")
    for gpu in GPUS.values():
        assert gpu.ceilings_of(4).flops == gpu.ceilings_of(2).flops / 2
    published = KNOWN["NVIDIA H100 80GB HBM3"]
    assert GPUS["h100"].ceilings.flops < published.flops
    assert GPUS["h100"].ceilings.bandwidth < published.bandwidth


def test_memory_that_does_not_suffice_is_said() -> None:
    config = dataclasses.replace(config_of("imagenet-r50"), pcl=PclConfig(num_peers=8, rampup_epochs=20.0))
    train = dataclasses.replace(config.train, batch_size=1024)
    work = dataclasses.replace(work_of("imagenet-r50"), num_views=8, num_peers=8, batch_size=1024)
    plan = plan_of("imagenet-r50")
    plan = dataclasses.replace(plan, config=dataclasses.replace(config, train=train, ranks=8), work=work)
    row = next(row for row in rows_of(plan) if row.what == "of a GPU")
    assert "too much, halve --train.batch-size" in row.value
    seen = StepTime(seconds=1.0, basis=Basis("measured", "a test"), memory=10**9)
    row = next(row for row in rows_of(dataclasses.replace(plan, step=seen)) if row.what == "of a step")
    assert row.value.startswith("1 GB of 149 GB")
    assert row.basis.kind == "measured"


def test_numbers_in_words() -> None:
    assert [amount(size) for size in (12, 1.5e3, 141e6, 157e9, 2e12)] == [
        "12 bytes",
        "1.5 kB",
        "141 MB",
        "157 GB",
        "2 TB",
    ]
    assert [duration(seconds) for seconds in (0.045, 1.5, 119, 240, 9000)] == [
        "45 ms",
        "1.5 s",
        "119 s",
        "4 minutes",
        "2.5 hours",
    ]
