"""Which device a run uses, in which precision and memory layout: `auto` settings made definite."""

import ctypes
import dataclasses
import functools
import importlib.util
import os
from typing import Literal

import torch

from pcl_fast.config import AmpConfig, Config
from pcl_fast.dist import find_place
from pcl_fast.errors import ConfigError


def resolve(config: Config) -> Config:
    """The configuration with every `auto` and every derived default replaced by what it means here.

    On the CPU, layout and precision go together: bfloat16 is fast only channels-last, float32 only
    without; bfloat16 is chosen where the processor multiplies it natively.
    """
    device = pick_device(config.device)
    dtype = config.amp.dtype
    if dtype == "auto":
        dtype = "bfloat16" if _native_bfloat16(device) else "float32"
    layout = config.channels_last
    if layout == "auto":
        layout = "on" if device.type != "cpu" or dtype == "bfloat16" else "off"
    alpha = config.pcl.rampup_epochs
    if alpha is None:
        alpha = round(config.pcl.rampup_share * config.train.epochs, 6)
    return dataclasses.replace(
        config,
        device=str(device),
        ranks=config.ranks or find_place().size,
        amp=AmpConfig(dtype=dtype),
        channels_last=layout,
        capture=_resolve_capture(config.capture, device),
        pcl=dataclasses.replace(config.pcl, rampup_epochs=alpha),
    )


def _resolve_capture(capture: Literal["auto", "on", "off"], device: torch.device) -> Literal["on", "off"]:
    if capture == "on" and device.type != "cuda":
        raise ConfigError(f"--capture on: {device} has no CUDA graphs; give auto or off")
    return "on" if capture != "off" and device.type == "cuda" else "off"


def pick_device(name: str) -> torch.device:
    """`auto` is the GPU of this rank, the first one if it is alone. ConfigError if the device is absent."""
    if name == "auto":
        return _own_gpu() if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"--device {name}: not a device; give auto, cpu, cuda or cuda:0") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"--device {name}: not supported; give auto, cpu, cuda or cuda:0")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"--device {name}: this machine has {torch.cuda.device_count()} GPUs; give auto or cpu"
        )
    return device


def _own_gpu() -> torch.device:
    place, gpus = find_place(), torch.cuda.device_count()
    if place.local_size > gpus:
        raise ConfigError(
            f"{place.local_size} ranks on this machine, which has {gpus} GPUs; "
            f"give torchrun --nproc-per-node {gpus}, or --device cpu"
        )
    return torch.device("cuda", place.local_rank) if place.size > 1 else torch.device("cuda")


@functools.cache
def has_triton() -> bool:
    """Whether Triton, which kernels for CUDA are written in, is installed."""
    return importlib.util.find_spec("triton") is not None


def memory_format(channels_last: str) -> torch.memory_format:
    """The torch memory format for a resolved `channels_last` setting."""
    return torch.channels_last if channels_last == "on" else torch.contiguous_format


def _native_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    has_avx512_bf16 = torch.cpu._is_avx512_bf16_supported()  # pyright: ignore[reportPrivateUsage]
    return has_avx512_bf16 or torch.cpu._is_amx_tile_supported()  # pyright: ignore[reportPrivateUsage]


def prepare_backend(config: Config) -> None:
    """Set what torch has one switch of for the whole process, as a resolved configuration wants it."""
    device = torch.device(config.device)
    if device.type == "cpu":
        keep_freed_memory()
    else:
        torch.cuda.set_device(device)  # where Triton launches
    torch.backends.cudnn.benchmark = not config.deterministic
    torch.backends.cudnn.benchmark_limit = 0  # choose among all algorithms, once
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only so
    torch.use_deterministic_algorithms(config.deterministic)


def keep_freed_memory() -> bool:
    """Let the C library keep freed blocks for the next step, instead of handing them back to the system.

    Activations are freed and allocated anew every step; without this each step pays for tens of
    thousands of page faults on the CPU. Returns whether the library took it (glibc does).
    """
    mmap_threshold, trim_threshold = (-3, 1 << 30), (-1, (1 << 31) - 1)  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(*setting) == 1 for setting in (mmap_threshold, trim_threshold))
