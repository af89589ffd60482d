"""The GPUs that a run can be planned for: what they multiply, move and hold, and the links between them."""

import dataclasses
from dataclasses import dataclass

from pcl_fast.errors import ConfigError, did_you_mean
from pcl_fast.profile.ceilings import KNOWN, Ceilings

GIB = 1 << 30
# An H200 is said to make 790 of the 989 TFLOP/s, and 4.3 of the 4.8 TB/s, that its data sheet says.
FLOPS_REACHED, BANDWIDTH_REACHED = 790 / 989, 4.3 / 4.8
TF32 = 0.5  # of bfloat16's products: torch's default for float32 convolutions on these GPUs


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """A GPU by the name of its flag; `memory` in bytes, `link` in bytes/s each way to others of its node."""

    name: str
    ceilings: Ceilings
    memory: int
    link: float

    def ceilings_of(self, width: int) -> Ceilings:
        """With activations of `width` bytes: float32 is multiplied as TF32."""
        flops = self.ceilings.flops * (1.0 if width < 4 else TF32)
        return dataclasses.replace(self.ceilings, flops=flops)


def _scaled(published: Ceilings) -> Ceilings:
    return dataclasses.replace(
        published,
        flops=published.flops * FLOPS_REACHED,
        bandwidth=published.bandwidth * BANDWIDTH_REACHED,
        source="published, less what an H200 misses of its own; kernel time assumed",
    )


_H200 = dataclasses.replace(
    KNOWN["NVIDIA H200"], source="said to be measured, not by us; kernel time assumed"
)

# Memory as drivers report it, rounded down; NVLink's bandwidth from the maker's data sheets: 900 GB/s
# (H100, H200) and 600 GB/s (A100), both ways together.
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu(name="h200", ceilings=_H200, memory=139 * GIB, link=450e9),
        Gpu(name="h100", ceilings=_scaled(KNOWN["NVIDIA H100 80GB HBM3"]), memory=79 * GIB, link=450e9),
        Gpu(name="a100", ceilings=_scaled(KNOWN["NVIDIA A100-SXM4-80GB"]), memory=79 * GIB, link=300e9),
    )
}


def find_gpu(name: str) -> Gpu:
    """By the name of its flag; ConfigError naming the nearest one if there is none."""
    if name not in GPUS:
        hint = did_you_mean(name, GPUS) or f" There are: {', '.join(GPUS)}."
        raise ConfigError(f"--gpu {name}: no figures of such a GPU.{hint}")
    return GPUS[name]


def named_in(device: str) -> Gpu | None:
    """The one that torch calls by this name, as `NVIDIA H200`; None if it is another."""
    words = device.lower().replace("-", " ").split()
    return next((gpu for name, gpu in GPUS.items() if name in words), None)
