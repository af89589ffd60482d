"""`--init`: what a run begins with, against loading it by hand; and what cannot be begun with."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pcl_fast.build import build_network, build_state
from pcl_fast.cli import main
from pcl_fast.config import Config
from pcl_fast.errors import ConfigError, DataError, Preempted
from pcl_fast.first_weights import begin_with, read_first_weights
from pcl_fast.models.zoo import find_backbone
from pcl_fast.objectives import make_objective
from pcl_fast.run_log import read_entries
from pcl_fast.step.state import TrainState
from tests.tiny import SignalAtStep, Watcher, assert_same_run, read_model, tiny_config, train

CLASSIFIER = ("classifier.weight", "classifier.bias")


def leave(path: Path, model: str = "resnet8", classes: int = 10) -> dict[str, Tensor]:
    """A network as a run leaves it, with running statistics of its own; its tensors."""
    torch.manual_seed(5)  # others than those of a run with seed 0
    network = find_backbone(model).build(classes)
    for name, buffer in network.named_buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5) if "var" in name else buffer.normal_()
        else:
            buffer.fill_(7)
    path.mkdir()
    save_file(network.state_dict(), path / "model.safetensors", {"model": model})
    return dict(network.state_dict())


def begun(config: Config) -> tuple[TrainState, list[str]]:
    """The state at step 0, and what was said."""
    said: list[str] = []
    return build_state(config, say=said.append, first=read_first_weights(config)), said


def check_equal(found: dict[str, Tensor], expected: dict[str, Tensor], but: tuple[str, ...] = ()) -> None:
    assert found.keys() == expected.keys()
    different = {key for key, value in found.items() if not torch.equal(value, expected[key])}
    assert different == set(but)


@pytest.mark.parametrize("by_file", [False, True])
def test_every_peer_and_mean_teacher_begins_with_all_of_it(tmp_path: Path, by_file: bool) -> None:
    """PCL's peers see views of their own, so that all begin with the classifier, too."""
    tensors = leave(tmp_path / "run")
    given = tmp_path / "run" / "model.safetensors" if by_file else tmp_path / "run"
    state, said = begun(tiny_config(init=given))
    assert said == [f"resnet8 of {tmp_path}/run/model.safetensors: {len(tensors)} of {len(tensors)} tensors"]
    assert state.mean_teacher is not None
    for network in (state.network, state.mean_teacher.network):
        for peer in range(2):
            check_equal(network.deployed_state_dict(peer), tensors)
    alone = build_state(tiny_config())
    assert isinstance(alone.network.ensemble, nn.Linear)
    assert isinstance(state.network.ensemble, nn.Linear)
    assert torch.equal(alone.network.ensemble.weight, state.network.ensemble.weight), "begins at random"


def test_other_classes_begin_with_the_classifiers_of_a_run_without_it(tmp_path: Path) -> None:
    tensors = leave(tmp_path / "run", classes=100)
    state, said = begun(tiny_config(init=tmp_path / "run"))
    counted = f"{len(tensors) - 2} of {len(tensors)} tensors"
    assert said[0].endswith(f": {counted}; the classifier (100 classes there, 10 here) starts anew")
    alone = build_state(tiny_config()).network
    for peer in range(2):
        found = state.network.deployed_state_dict(peer)
        own = {key: alone.deployed_state_dict(peer)[key] for key in CLASSIFIER}
        check_equal(found, tensors | own)


def test_peers_that_see_one_view_do_not_begin_as_one(tmp_path: Path) -> None:
    """With equal classifiers, networks of DML would stay equal for ever, and teach each other nothing."""
    tensors = leave(tmp_path / "run")
    state, said = begun(tiny_config(method="dml", init=tmp_path / "run"))
    assert said[0].endswith("; the classifier in peer 1 alone, as peers that are equal would stay equal")
    check_equal(state.network.deployed_state_dict(0), tensors)
    check_equal(state.network.deployed_state_dict(2), tensors, but=CLASSIFIER)
    state, said = begun(tiny_config(method="okddip", init=tmp_path / "run"))
    check_equal(state.network.deployed_state_dict(3), tensors)
    check_equal(state.network.deployed_state_dict(0), tensors, but=CLASSIFIER)


def test_hidden_layers_of_a_head_begin_with_it(tmp_path: Path) -> None:
    """VGG's classifier has three layers, of which one makes the logits."""
    tensors = leave(tmp_path / "run", "vgg16", classes=3)
    config = tiny_config(model="vgg16", method="vanilla", init=tmp_path / "run")
    network, objective = build_network(config, make_objective(config)), make_objective(config)
    fresh = network.deployed_state_dict()
    last = tuple(key for key in fresh if fresh[key].shape[:1] == (10,))
    own = {key: fresh[key].clone() for key in last}
    given = read_first_weights(config)
    assert given is not None
    begin_with(network, objective, given)
    assert len(last) == 2
    check_equal(network.deployed_state_dict(), tensors | own)


def test_of_several_backbones_its_own_take_it(tmp_path: Path) -> None:
    tensors = leave(tmp_path / "run")
    state, said = begun(tiny_config(model="resnet8,resnet20", init=tmp_path / "run"))
    assert said[0].endswith(" tensors; peer 2 (resnet20) starts anew")
    check_equal(state.network.deployed_state_dict(0), tensors)
    state, said = begun(tiny_config(model="resnet20,resnet8", init=tmp_path / "run"))
    held = sum(key.startswith(("stage3", "classifier")) for key in tensors)
    assert f": {held} of {len(tensors)} tensors; the trunk (resnet20) starts anew; peer 1 " in said[0]
    found = state.network.deployed_state_dict(1)
    for key in tensors:
        if key.startswith(("stage3", "classifier")):
            assert torch.equal(found[key], tensors[key])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": "resnet20"}, r"model.safetensors: is a resnet8, and --model is resnet20; give"),
        ({"init": Path("no/such/run")}, r"--init no/such/run: not there; give the folder of a run"),
    ],
)
def test_another_network_is_one_line(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    leave(tmp_path / "run")
    with pytest.raises(ConfigError, match=says) as caught:
        begun(tiny_config(**({"init": tmp_path / "run"} | changes)))
    assert "\n" not in str(caught.value)


def test_other_shapes_name_the_first_tensor_and_both(tmp_path: Path) -> None:
    tensors = leave(tmp_path / "run")
    file = tmp_path / "run" / "model.safetensors"
    name = "stage3.0.body.3.weight"
    save_file(tensors | {name: torch.zeros(96, 64, 3, 3)}, file, {"model": "resnet8"})
    with pytest.raises(ConfigError, match=rf"no such resnet8: '{name}' is 96 x 64 x 3 x 3, here 64 x 64 x"):
        begun(tiny_config(init=tmp_path / "run"))
    save_file(tensors | {"stage4": torch.zeros(96)}, file, {"model": "resnet8"})
    with pytest.raises(ConfigError, match=r"no such resnet8: 'stage4', 96, is not in it; give"):
        begun(tiny_config(init=tmp_path / "run"))
    save_file({k: v for k, v in tensors.items() if k != "stem.0.weight"}, file, {"model": "resnet8"})
    with pytest.raises(ConfigError, match=r"'stem.0.weight' is missing; give a run of the same --model"):
        begun(tiny_config(init=tmp_path / "run"))


def test_damaged_files_are_named(tmp_path: Path) -> None:
    tensors = leave(tmp_path / "run")
    file = tmp_path / "run" / "model.safetensors"
    whole = file.read_bytes()
    for damaged in (b"", whole[:-1], whole[:100], b"\xff" * 100, whole + b"x"):
        file.write_bytes(damaged)
        with pytest.raises(DataError, match=r"--init .*model.safetensors: not a network of a run"):
            begun(tiny_config(init=tmp_path / "run"))
    save_file(tensors, file)  # by somebody else
    with pytest.raises(DataError, match="not a network of a run"):
        begun(tiny_config(init=tmp_path / "run"))
    tensors["stem.1.running_var"][3] = float("nan")
    save_file(tensors, file, {"model": "resnet8"})
    with pytest.raises(DataError, match=r"damaged: 'stem.1.running_var' holds numbers that are not finite"):
        begun(tiny_config(init=tmp_path / "run"))


def test_a_run_that_goes_on_needs_it_no_more(tmp_path: Path) -> None:
    """Stopped, what it began with deleted, and gone on with: as if it had never been stopped."""
    leave(tmp_path / "given")
    config = tiny_config(init=tmp_path / "given")
    said = Watcher()
    train(tmp_path / "whole", config, [said])
    assert [line for line in said.messages if "model.safetensors" in line and "tensors" in line]
    with pytest.raises(Preempted, match="SIGTERM"):
        train(tmp_path / "cut", config, [SignalAtStep(3)])
    (started, _) = read_entries(tmp_path / "cut" / "starts.jsonl")
    shutil.rmtree(tmp_path / "given")
    train(tmp_path / "cut", config)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    assert len(started["init"]) == 64
    kept = json.loads((tmp_path / "cut" / "config.json").read_text())
    assert kept["init"] == str(tmp_path / "given")


def test_the_command_takes_no_folder_for_what_cannot_begin(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    leave(tmp_path / "run", "resnet20")
    words = f"train cifar10-resnet32 --model resnet8 --data.backend synthetic --run-dir {tmp_path}/new"
    assert main([*words.split(), "--init", str(tmp_path / "run")]) == 2
    assert "is a resnet20, and --model is resnet8" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_tiny_run_goes_over_to_another_method(tmp_path: Path) -> None:
    """What PCL has left begins a DML; its own product is loaded by the plain network."""
    train(tmp_path / "first", tiny_config())
    left = read_model(tmp_path / "first" / "model.safetensors")["tensors"]
    config = tiny_config(method="dml", init=tmp_path / "first", optim={"lr": 1e-30, "weight_decay": 0.0})
    train(tmp_path / "second", config)
    found = read_model(tmp_path / "second" / "model.safetensors")["tensors"]
    learned = [key for key in left if "running" not in key and "tracked" not in key]
    assert all(torch.equal(left[key], found[key]) for key in learned), "nothing is learned at a rate of 0"
