"""Two-stage distillation against its formula, and the teacher that it takes from a finished run."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pcl_fast.build import build_state
from pcl_fast.commands.settings import choose
from pcl_fast.config import KdConfig
from pcl_fast.errors import ConfigError
from pcl_fast.models.zoo import find_backbone
from pcl_fast.objectives.kd import Distillation
from pcl_fast.step.train_step import Moment, train_step
from pcl_fast.trained_teacher import load_teacher
from tests.objectives.oracles import as_numpy, cross_entropy, kl, noise, said
from tests.step.tiny import make_batches
from tests.tiny import tiny_config


def test_it_is_its_formula() -> None:
    z, teacher = noise(1, 4, 6).requires_grad_(), noise(1, 4, 6).requires_grad_()
    objective = Distillation(KdConfig(temperature=3.0, alpha=0.7))
    terms = objective.terms(said(z), said(teacher), torch.arange(4), weight=0.1)
    expected = [
        cross_entropy(as_numpy(z[0]), [0, 1, 2, 3]),
        0.7 * 9 * kl(as_numpy(teacher[0]), as_numpy(z[0]), 3.0),
    ]
    assert terms.tolist() == pytest.approx(expected, rel=1e-12)
    terms.sum().backward()
    assert z.grad is not None
    assert teacher.grad is None, "the teacher is taught by nobody"


def save_network(path: Path, model: str = "resnet8", classes: int = 10) -> torch.nn.Module:
    """A network as a finished run leaves it."""
    network = find_backbone(model).build(classes)
    for buffer in network.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    path.mkdir()
    save_file(network.state_dict(), path / "model.safetensors", {"model": model})
    return network.eval()


def kd_config(teacher: Path | None, **changes: Any) -> Any:
    return tiny_config(method="kd", kd={"teacher": teacher}, **changes)


def test_the_teacher_is_the_network_that_a_run_has_left(tmp_path: Path) -> None:
    network = save_network(tmp_path / "run")
    images_BCHW = torch.randn(3, 3, 16, 16)
    for given in (tmp_path / "run", tmp_path / "run" / "model.safetensors"):
        teacher = load_teacher(kd_config(given))
        with torch.no_grad():
            assert torch.equal(teacher(images_BCHW[None]).logits_VBC[0], network(images_BCHW))
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_the_teacher_stays_what_it_is_while_it_teaches(tmp_path: Path) -> None:
    """Also after an evaluation; nothing of it is saved with the run."""
    save_network(tmp_path / "run")
    state = build_state(kd_config(tmp_path / "run"))
    (batch,) = make_batches(1, views=1)
    assert state.teacher_forward is not None
    before = state.teacher_forward(batch.views_VBCHW).logits_VBC
    for step in (1, 2, 3):
        state.learning_mode()
        train_step(state, batch, Moment(step, 0.05, 1.0, 0.0))
    assert torch.equal(state.teacher_forward(batch.views_VBCHW).logits_VBC, before)
    assert state.state_dict()["mean_teacher"] is None


def test_a_teacher_that_cannot_teach_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^--kd.teacher is missing: give the folder of a finished run$"):
        load_teacher(kd_config(None))
    with pytest.raises(ConfigError, match=r"model.safetensors: not there|none: not there"):
        load_teacher(kd_config(tmp_path / "none"))
    save_network(tmp_path / "other", classes=7)
    with pytest.raises(ConfigError, match=r"is no resnet8 for 10 classes; give .* the same data set"):
        load_teacher(kd_config(tmp_path / "other"))
    (tmp_path / "broken.safetensors").write_bytes(b"no such thing")
    with pytest.raises(ConfigError, match=r"broken.safetensors: not a network of a run"):
        load_teacher(kd_config(tmp_path / "broken.safetensors"))
    assert build_state(kd_config(tmp_path / "none"), teach=False).teacher_forward is None


def test_a_run_without_a_teacher_trains_one_first(tmp_path: Path) -> None:
    words = [
        "cifar10-resnet32",
        "--method",
        "kd",
        "--kd.teacher-model",
        "resnet8",
        "--run-dir",
        str(tmp_path / "x"),
    ]
    chosen = choose("train", [*words, "--data.backend", "synthetic"])
    (first, of_first), (second, of_second) = chosen.runs
    assert (first.method, first.model, of_first) == ("vanilla", "resnet8", tmp_path / "x" / "teacher")
    assert (second.method, second.model, of_second) == ("kd", "resnet32", tmp_path / "x")
    assert second.kd.teacher == of_first
    given = choose("train", [*words, "--data.backend", "synthetic", "--kd.teacher", "some/run"])
    assert [(run.method, run.kd.teacher) for run, _ in given.runs] == [("kd", Path("some/run"))]
