"""Every rival through the product: trained, stopped and gone on with, evaluated, deployed, compiled."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pcl_fast.build import build_state
from pcl_fast.config import Config
from pcl_fast.errors import ConfigError, Preempted
from pcl_fast.models.zoo import find_backbone
from pcl_fast.objectives import METHODS, make_objective
from pcl_fast.sinks import read_records
from pcl_fast.step.train_step import train_step
from tests.step.tiny import make_batches, moment
from tests.tiny import (
    IMAGE_SIZE,
    STEPS,
    SignalAtStep,
    assert_same_run,
    newest_checkpoint,
    tiny_config,
    train,
)

RIVALS = [name for name in METHODS if name not in ("pcl", "vanilla")]
SEPARATE = ("dml", "kdcl")
HEADS = {"one": {"ensemble"}, "okddip": {"ensemble"}, "ffl": {"ensemble"}}


def config_of(method: str, **changes: Any) -> Config:
    """As small as it can be; in bfloat16 with our kernels where nothing else is said."""
    return tiny_config(method=method, **({"amp": {"dtype": "bfloat16"}, "channels_last": "auto"} | changes))


@pytest.fixture(scope="module", params=RIVALS)
def rival(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Path]:
    """A method, and the folder of its run that nothing disturbed."""
    folder = tmp_path_factory.mktemp(request.param) / "run"
    config = config_of(request.param)
    if request.param == "kd":
        train(folder.with_name("teacher"), config_of("vanilla", seed=1))
        config = config_of("kd", kd={"teacher": folder.with_name("teacher")})
    train(folder, config)
    return config, folder


def test_a_run_learns_and_reports_every_head(rival: tuple[Config, Path]) -> None:
    config, folder = rival
    objective = make_objective(config)
    last = read_records(folder / "metrics.jsonl")[-1]
    peers = {f"peer{j + 1}" for j in range(objective.num_peers)}
    assert last["val"].keys() == peers | HEADS.get(config.method, set())
    assert set(objective.headline.values()) <= last["val"].keys()
    assert tuple(last["terms"]) == objective.term_names


# What a norm takes away again.
WITHOUT_EFFECT = {"ensemble.score.bias"}


def test_every_weight_has_a_gradient(rival: tuple[Config, Path]) -> None:
    state = build_state(rival[0])
    train_step(state, make_batches(1, views=state.objective.num_views)[0], moment(1))
    for name, weight in state.network.named_parameters():
        assert weight.grad is not None
        assert bool(weight.grad.any()) or name in WITHOUT_EFFECT, name


@pytest.mark.parametrize("step", [3, 4])
def test_a_run_that_was_stopped_ends_alike(rival: tuple[Config, Path], tmp_path: Path, step: int) -> None:
    config, straight = rival
    with pytest.raises(Preempted):
        train(tmp_path / "run", config, [SignalAtStep(step)])
    watcher = SignalAtStep(-1)
    train(tmp_path / "run", config, [watcher])
    assert watcher.steps == list(range(step + 1, STEPS + 1))
    assert_same_run(tmp_path / "run", straight)


def test_what_is_deployed_is_the_peer_s_own_network(rival: tuple[Config, Path]) -> None:
    """OKDDip's leader, the first peer of the others; float64, so that only rounding is left."""
    config, folder = rival
    plain = find_backbone(config.model).build(10)
    plain.load_state_dict(load_file(folder / "model.safetensors"))
    state = build_state(config)
    state.load_state_dict(newest_checkpoint(folder)["state"])
    network = state.network.double().eval()
    images_BCHW = torch.randn(5, 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.float64)
    with torch.no_grad():
        logits_VBC = network(images_BCHW[None]).logits_VBC
        said_BC = plain.double().eval()(images_BCHW)
    peer = 3 if config.method == "okddip" else 0
    torch.testing.assert_close(said_BC, logits_VBC[peer], rtol=1e-10, atol=1e-10)
    others = [logits_BC for j, logits_BC in enumerate(logits_VBC) if j != peer]
    assert all((logits_BC - said_BC).abs().max() > 1e-3 for logits_BC in others)
    headline = state.objective.headline
    assert next(iter(headline.values())) == f"peer{peer + 1}"


def test_peers_share_what_the_method_says(rival: tuple[Config, Path]) -> None:
    config, _ = rival
    for separate in (True, False) if config.method in SEPARATE else (False,):
        chosen = config
        if config.method in SEPARATE:
            options = dataclasses.replace(getattr(config, config.method), separate=separate)
            chosen = dataclasses.replace(config, **{config.method: options})
        network = build_state(chosen).network
        assert (sum(1 for _ in network.trunk.parameters()) == 0) is separate


def test_another_method_s_run_is_not_gone_on_with(rival: tuple[Config, Path], tmp_path: Path) -> None:
    config, folder = rival
    copied = tmp_path / "run"
    shutil.copytree(folder, copied)
    other = dataclasses.replace(config, method="vanilla")
    with pytest.raises(ConfigError, match=f"method: {config.method} -> vanilla"):
        train(copied, other)


@pytest.mark.parametrize(
    ("method", "flag"), [("one", "temperature"), ("dml", "separate"), ("okddip", "num_peers")]
)
def test_another_option_is_not_gone_on_with(method: str, flag: str, tmp_path: Path) -> None:
    config = config_of(method)
    with pytest.raises(Preempted):
        train(tmp_path, config, [SignalAtStep(1)])
    options: Any = getattr(config, method)
    value: Any = not options.separate if flag == "separate" else getattr(options, flag) + 1
    changed = dataclasses.replace(config, **{method: dataclasses.replace(options, **{flag: value})})
    with pytest.raises(ConfigError, match=rf"{method}\.{flag}: "):
        train(tmp_path, changed)


@pytest.mark.timeout(180)  # a compiler's work, on a busy machine
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler here")
def test_a_compiled_step_is_the_eager_one() -> None:
    """ONE: a head that is not linear, with a norm of its own."""
    torch.compiler.reset()
    said: list[str] = []
    eager, compiled = (
        build_state(
            config_of("one", one={"num_peers": 2}, amp={"dtype": "float32"}, compile=on), say=said.append
        )
        for on in (False, True)
    )
    for index, batch in enumerate(make_batches(2, views=1), start=1):
        both = [train_step(state, batch, moment(index)) for state in (eager, compiled)]
        torch.testing.assert_close(both[1].terms, both[0].terms, rtol=1e-4, atol=1e-5)
    assert said == []
    for one, other in zip(eager.network.parameters(), compiled.network.parameters(), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-4)
