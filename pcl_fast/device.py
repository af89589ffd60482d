"""Which device a run uses, in which precision and memory layout: `auto` settings made definite."""

import dataclasses

import torch

from pcl_fast.config import AmpConfig, Config
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
        amp=AmpConfig(dtype=dtype),
        channels_last=layout,
        pcl=dataclasses.replace(config.pcl, rampup_epochs=alpha),
    )


def pick_device(name: str) -> torch.device:
    """`auto` is the first GPU if there is one. ConfigError if the device is unknown or absent."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"--device {name}: not a device; give auto, cpu, cuda or cuda:0") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"--device {name}: not supported; give auto, cpu, cuda or cuda:0")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"--device {name}: this machine has {torch.cuda.device_count()} GPUs; give auto or cpu")
    return device


def memory_format(channels_last: str) -> torch.memory_format:
    """The torch memory format for a resolved `channels_last` setting."""
    return torch.channels_last if channels_last == "on" else torch.contiguous_format


def _native_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
