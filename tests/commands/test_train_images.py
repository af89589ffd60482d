"""ImageNet's commands on a few pictures: trained from folders and .beton files, stopped, resumed, judged."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pcl_fast import cli
from pcl_fast.sinks import read_records
from tests.commands.conftest import Process
from tests.conftest import REPOSITORY
from tests.datasets_prep.pictures import convert_folder, write_folder
from tests.tiny import assert_same_run, newest_checkpoint

SETTINGS = shlex.split(
    "--model resnet8 --pcl.num-peers 2 --data.backend torch --data.image-size 16 --train.batch-size 4 "
    "--train.eval-batch-size 5 --train.log-every 1 --device cpu --amp.dtype float32 --kernels off"
)
EPOCHS, STEPS_PER_EPOCH = 10, 6
LONG = ["--train.epochs", str(EPOCHS), "--train.eval-every", str(EPOCHS), "--train.save-every", str(EPOCHS)]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train/ and val/ of three classes, and the same as .beton files."""
    path = tmp_path_factory.mktemp("photos")
    for split, images in (("train", STEPS_PER_EPOCH * 4 + 2), ("val", 11)):
        write_folder(path / split, images=images)
        convert_folder(path / split, path / f"{split}.beton")
    return path


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")


def data(photos: Path, suffix: str = "") -> list[str]:
    return ["--data.train", f"{photos}/train{suffix}", "--data.val", f"{photos}/val{suffix}"]


def test_config_tells_the_numbers_of_the_images_at_hand(
    photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for suffix in ("", ".beton"):
        assert cli.main(["config", "imagenet-r18", *data(photos, suffix), *SETTINGS]) == 0
        said = capsys.readouterr().out
        assert f"26 of 3 classes, {photos}/train{suffix}, decoded by torch" in said
        assert "6 an epoch, 540 in all" in said
        assert "--data.num-classes 3" in " ".join(said.split())
    assert cli.main(["config", "imagenet-r18", *SETTINGS]) == 0
    assert "1,281,167 of 1000 classes, not given yet: --data.train" in capsys.readouterr().out


def start(*words: str) -> Process:
    """`pcl-fast WORDS` in a group of processes of its own, as a terminal's."""
    variables = {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.Popen(
        [sys.executable, "-m", "pcl_fast", *words],
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.timeout(200)
def test_ctrl_c_of_the_whole_group_and_resuming_change_nothing(photos: Path) -> None:
    command = ["train", "imagenet-r18", *data(photos), *SETTINGS, *LONG]
    assert cli.main([*command, "--data.workers", "0", "--run-dir", "straight"]) == 0
    child = start(*command, "--data.workers", "2", "--run-dir", "stopped")
    try:
        deadline = time.monotonic() + 90
        while len(read_records(Path("stopped/metrics.jsonl"))) < STEPS_PER_EPOCH + 2:
            assert child.poll() is None, "it ended too early"
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.killpg(child.pid, signal.SIGINT)
        _, err = child.communicate(timeout=60)
    finally:
        child.kill()
    assert child.returncode == 75, err
    assert "stopped by SIGINT after step" in err
    assert newest_checkpoint(Path("stopped"))["progress"]["steps_done"] > STEPS_PER_EPOCH
    assert cli.main([*command, "--data.workers", "1", "--run-dir", "stopped"]) == 0
    assert_same_run(Path("straight"), Path("stopped"))


def test_a_run_is_evaluated_on_what_it_was_validated_on_or_elsewhere(
    photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*data(photos, ".beton"), *SETTINGS, "--data.workers", "0", "--train.epochs", "1"]
    assert cli.main(["train", "imagenet-r18", *words, "--run-dir", "run"]) == 0
    config = json.loads(Path("run/config.json").read_text())
    assert config["data"]["num_classes"] == 3
    last = [record for record in read_records(Path("run/metrics.jsonl")) if "val" in record][-1]
    assert {head["images"] for head in last["val"].values()} == {11}
    trained = last["val"] | {"between": last["between"]}
    for place in ([], ["--val", f"{photos}/val", "--workers", "1"]):
        assert cli.main(["evaluate", "run", "--device", "cpu", "--json", "figures.json", *place]) == 0
        assert json.loads(Path("figures.json").read_text())["run"] == trained
    assert "11 images" in capsys.readouterr().out


def error_of(words: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.main(["train", "imagenet-r18", *SETTINGS, *words]) == code
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert not Path("runs").exists()
    return said


def test_images_that_do_not_fit_are_refused(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both = data(photos)
    said = error_of([*both, "--data.num-classes", "1000"], 3, capsys)
    assert f"{photos}/train has 3 classes, not --data.num-classes 1000" in said
    write_folder(Path("other"), images=4, classes=2)
    said = error_of([*both, "--data.val", "other"], 3, capsys)
    assert f"{photos}/train has 3 classes and other 2, not the same ones (as c2)" in said
    assert "--data.val is missing" in error_of(both[:2], 2, capsys)
    assert "holds train and val, not classes" in error_of([*both, "--data.train", str(photos)], 3, capsys)
    said = error_of([*both, "--data.backend", "ffcv"], 2, capsys)
    assert "ffcv reads .beton files; make one of this folder" in said
    assert "ImageNet is read by ffcv" in error_of([*both, "--data.backend", "resident"], 2, capsys)
    assert "the training set has 26 images" in error_of([*both, "--data.subset", "27"], 2, capsys)
    assert "do not fill one batch of 32" in error_of([*both, "--train.batch-size", "32"], 3, capsys)
    assert "a folder has no pages" in error_of([*both, "--data.order", "pages"], 2, capsys)


def test_a_run_goes_on_with_its_own_file_only(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*SETTINGS, "--data.workers", "0", "--train.epochs", "1", "--data.val", f"{photos}/val.beton"]
    run = ["train", "imagenet-r18", *words, "--run-dir", "run", "--data.train"]
    assert cli.main([*run, f"{photos}/train.beton"]) == 0
    moved = Path(shutil.copy(photos / "train.beton", tmp_path / "moved.beton"))
    assert cli.main([*run, str(moved)]) == 0, "another place and no manifest, but the same images"
    write_folder(tmp_path / "others", images=STEPS_PER_EPOCH * 4 + 3)
    convert_folder(tmp_path / "others", tmp_path / "others.beton")
    capsys.readouterr()
    assert cli.main([*run, str(tmp_path / "others.beton")]) == 2
    assert "data.fingerprint: " in capsys.readouterr().err
    assert cli.main([*run, str(moved), "--data.fingerprint", "00000000"]) == 3
    assert "not --data.fingerprint 00000000" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data.backend", "torch"], "--data.backend torch: cifar10 is trained with resident"),
        (["--data.train", "x"], "--data.train x: not for cifar10"),
        (["--data.image-size", "64"], "--data.image-size 64: not for cifar10"),
        (["--data.num-classes", "11"], "--data.num-classes 11: cifar10 has 10 classes"),
    ],
)
def test_cifar_has_none_of_these(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "cifar10-resnet32", *words]) == 2
    assert message in capsys.readouterr().err
