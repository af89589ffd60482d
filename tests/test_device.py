"""What `auto` means: device, precision, memory layout and ramp-up made definite."""

from typing import Any

import pytest
import torch

from pcl_fast.build import build_network
from pcl_fast.config import AmpConfig, Config, PclConfig, TrainConfig
from pcl_fast.device import memory_format, pick_device, resolve
from pcl_fast.errors import ConfigError
from pcl_fast.objectives import make_objective

NO_GPU = not torch.cuda.is_available()


@pytest.mark.parametrize(
    ("dtype", "layout", "expected"),
    [
        ("float32", "auto", "off"),
        ("bfloat16", "auto", "on"),
        ("float32", "on", "on"),
        ("bfloat16", "off", "off"),
    ],
)
def test_on_the_cpu_the_layout_follows_the_precision(dtype: Any, layout: Any, expected: str) -> None:
    config = resolve(Config(device="cpu", amp=AmpConfig(dtype=dtype), channels_last=layout))
    assert (config.device, config.amp.dtype, config.channels_last) == ("cpu", dtype, expected)


@pytest.mark.parametrize(("native", "dtype", "layout"), [(True, "bfloat16", "on"), (False, "float32", "off")])
def test_the_processor_decides_what_auto_precision_is(
    native: bool, dtype: str, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    config = resolve(Config(device="cpu"))
    assert (config.amp.dtype, config.channels_last) == (dtype, layout)


def test_nothing_is_left_open_and_resolving_again_changes_nothing() -> None:
    config = resolve(Config(device="cpu", train=TrainConfig(epochs=7)))
    assert "auto" not in (config.device, config.amp.dtype, config.channels_last)
    assert config.pcl.rampup_epochs == pytest.approx(7 * 80 / 300, abs=1e-6)
    assert resolve(config) == config


def test_what_was_given_is_kept() -> None:
    given = Config(
        device="cpu",
        amp=AmpConfig(dtype="bfloat16"),
        channels_last="off",
        capture="off",
        ranks=2,
        pcl=PclConfig(rampup_epochs=0.0, num_peers=5),
    )
    assert resolve(given) == given


def test_a_cpu_has_no_graphs_to_capture() -> None:
    assert resolve(Config(device="cpu")).capture == "off"
    with pytest.raises(ConfigError, match=r"^--capture on: cpu has no CUDA graphs; give auto or off$"):
        resolve(Config(device="cpu", capture="on"))


@pytest.mark.skipif(not NO_GPU, reason="this machine has a GPU")
def test_auto_is_the_cpu_where_there_is_no_gpu() -> None:
    assert pick_device("auto") == torch.device("cpu")
    with pytest.raises(ConfigError, match=r"^--device cuda: this machine has 0 GPUs; give auto or cpu$"):
        pick_device("cuda")


@pytest.mark.gpu
def test_auto_is_the_gpu_channels_last_where_there_is_one() -> None:
    config = resolve(Config())
    assert torch.device(config.device).type == "cuda"
    assert config.channels_last == "on"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gpu", "--device gpu: not a device; give auto, cpu, cuda or cuda:0"),
        ("", "--device : not a device; give auto, cpu, cuda or cuda:0"),
        ("cuda:x", "--device cuda:x: not a device; give auto, cpu, cuda or cuda:0"),
        ("meta", "--device meta: not supported; give auto, cpu, cuda or cuda:0"),
        ("mps", "--device mps: not supported; give auto, cpu, cuda or cuda:0"),
        ("cuda:99", f"--device cuda:99: this machine has {torch.cuda.device_count()} GPUs; give auto or cpu"),
    ],
)
def test_a_device_that_is_not_there_is_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(Config(device=name))
    assert str(caught.value) == message


@pytest.mark.parametrize("layout", ["on", "off"])
def test_the_layout_reaches_the_weights(layout: Any) -> None:
    config = resolve(Config(device="cpu", model="resnet8", channels_last=layout))
    network = build_network(config, make_objective(config))
    weight = network.branches[0].get_parameter("stage3.0.body.0.weight")
    assert weight.is_contiguous(memory_format=memory_format(layout))
    other = memory_format("off" if layout == "on" else "on")
    assert not weight.is_contiguous(memory_format=other)
