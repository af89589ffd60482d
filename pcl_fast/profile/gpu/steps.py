"""Whole training steps, in every mode, of every network of the paper; alone and with PCL."""

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Literal

import torch

from pcl_fast.config import Config, DataConfig
from pcl_fast.device import resolve
from pcl_fast.presets import find_preset
from pcl_fast.profile.gpu.bench import Bench, Row
from pcl_fast.profile.roofline import step_floor, step_work
from pcl_fast.profile.trace import count_kernels
from pcl_fast.profile.variants import BASELINES, Variant, open_variant

Network = tuple[str, int]  # the model, images in a batch
CIFAR: tuple[Network, ...] = (
    ("resnet32", 256),
    ("resnet32", 512),
    ("resnet110", 128),
    ("vgg16", 128),
    ("wrn20_8", 128),
    ("densenet40_12", 128),
)
IMAGENET: tuple[Network, ...] = (("resnet18", 256), ("resnet50", 256), ("resnet18", 128), ("resnet50", 128))
COUNTED: tuple[Network, ...] = (
    ("resnet110", 128),
    ("vgg16", 128),
    ("wrn20_8", 128),
    ("densenet40_12", 128),
    ("resnet18", 128),
    ("resnet50", 128),
)
TINY_CIFAR: tuple[Network, ...] = (("resnet8", 4),)
TINY_IMAGENET: tuple[Network, ...] = (("resnet18", 2),)
PAPER: tuple[Network, ...] = (("resnet32", 128),)  # the row that the goals speak of
PLAIN, COMPILED = ("captured", "eager"), ("captured-compiled", "compiled")


def step_config(
    bench: Bench, network: Network, method: Literal["pcl", "vanilla"] = "pcl", seed: int = 0
) -> Config:
    """The recipe of the paper's row of a network, CIFAR-100's or ImageNet's, resolved for the device."""
    model, batch = network
    of_imagenet = model in ("resnet18", "resnet50", "resnext50")
    config = find_preset("imagenet-r18" if of_imagenet else "cifar100-resnet32").config
    data = config.data
    if bench.tiny and of_imagenet:
        data = DataConfig(dataset="imagenet", image_size=32, num_classes=10)
    train = dataclasses.replace(config.train, batch_size=batch)
    config = dataclasses.replace(config, model=model, train=train, data=data, method=method, seed=seed)
    return resolve(dataclasses.replace(config, device=str(bench.device)))


def measure_paper_row(bench: Bench) -> None:
    """ResNet-32: on noise in every uncompiled mode, the baselines, alone; and with its views made."""
    for network in bench.pick(PAPER, TINY_CIFAR):
        measure_network(bench, network, PLAIN)
        _measure(bench, bench.best_mode, step_config(bench, network), augmented=True)
        for name in BASELINES:
            _measure(bench, name, step_config(bench, network))


def measure_cifar(bench: Bench) -> None:
    """The other networks and batches of CIFAR, captured and eager."""
    for network in bench.pick(CIFAR, TINY_CIFAR):
        measure_network(bench, network, PLAIN)


def measure_imagenet(bench: Bench) -> None:
    """ResNet-18 and ResNet-50 on images of 224 pixels, captured and eager."""
    for network in bench.pick(IMAGENET, TINY_IMAGENET):
        measure_network(bench, network, PLAIN)


def measure_compiled(bench: Bench, networks: Sequence[Network]) -> None:
    """Through torch.compile: minutes for some networks."""
    for network in networks:
        for name in COMPILED:
            _measure(bench, name, step_config(bench, network))


def measure_network(bench: Bench, network: Network, names: Sequence[str]) -> None:
    """A PCL step in these modes, with its floor; and the step of the network alone in the best one."""
    config = step_config(bench, network)
    bench.attempt({"what": "floor", **_about(config)}, partial(_floor, bench, config))
    _measure(bench, names[0], config)
    _measure(bench, bench.best_mode, step_config(bench, network, method="vanilla"))
    for name in names[1:]:
        _measure(bench, name, config)


def count_steps(bench: Bench) -> None:
    """Kernels and launches of a step. In a part of its own: the profiler stays with its process."""
    for network in bench.pick(PAPER, TINY_CIFAR):
        for name in (*PLAIN, *BASELINES):
            _count(bench, name, step_config(bench, network))
    for network in bench.pick(COUNTED, TINY_CIFAR):
        _count(bench, bench.best_mode, step_config(bench, network))


def _about(config: Config) -> Row:
    return {"model": config.model, "batch": config.train.batch_size, "method": config.method}


def _measure(bench: Bench, name: str, config: Config, augmented: bool = False) -> Row | None:
    about = {"what": "step", "mode": name, **_about(config), "augmented": augmented}
    return bench.attempt(about, partial(_times, bench, name, config, augmented))


def _times(bench: Bench, name: str, config: Config, augmented: bool) -> Row:
    views = config.pcl.num_peers if config.method == "pcl" else 1
    loader = bench.open_loader(config, views) if augmented else None
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(bench.device)
    variant = open_variant(name, config, loader)
    try:
        warmup = variant.warm_up()
        if variant.refused is not None:
            return {"refused": variant.refused}
        seconds = bench.time(variant.step)
        variant.check()
        if variant.refused is not None:
            return {"refused": variant.refused}
        return {"seconds": seconds, "warmup_seconds": warmup, "said": list(variant.said), **_memory(bench)}
    finally:
        variant.close()


def _memory(bench: Bench) -> Row:
    if bench.device.type != "cuda":
        return {}
    allocated = torch.cuda.max_memory_allocated(bench.device)
    return {"peak_bytes": allocated, "reserved_bytes": torch.cuda.max_memory_reserved(bench.device)}


def _floor(bench: Bench, config: Config) -> Row:
    floor = step_floor(step_work(config), bench.ceilings)
    return {
        "flops": floor.flops,
        "bytes": floor.bytes,
        "update_bytes": floor.update_bytes,
        "kernels": floor.kernels,
        "floor_seconds": floor.seconds,
        "graph_seconds": floor.graph_seconds,
        "ceilings": asdict(bench.ceilings),
    }


def _count(bench: Bench, name: str, config: Config) -> None:
    def count() -> Row:
        variant: Variant = open_variant(name, config)
        try:
            variant.warm_up()
            if variant.refused is not None:
                return {"refused": variant.refused}
            began = time.perf_counter()
            counts = count_kernels(variant.step, bench.device)
            return {**asdict(counts), "profiled_seconds": time.perf_counter() - began}
        finally:
            variant.close()

    bench.attempt({"what": "count", "mode": name, **_about(config)}, count)
