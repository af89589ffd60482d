"""The command line: one clear line and the right exit code for whatever is wrong."""

from pathlib import Path

import pytest
import torch

from pcl_fast import __version__, cli
from pcl_fast.commands import train as train_command
from pcl_fast.errors import Preempted
from pcl_fast.presets import preset_names

SYNTHETIC = [
    "train",
    "cifar10-resnet32-vanilla",
    "--model",
    "resnet8",
    "--data.backend",
    "synthetic",
    "--data.subset",
    "32",
    "--train.batch-size",
    "8",
    "--device",
    "cpu",
    "--amp.dtype",
    "float32",
    "--run-dir",
    "run",
]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder and a data folder with nothing in them, and a wide terminal."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PCL_FAST_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


def code_of(words: list[str]) -> int | str | None:
    """The exit code, however the command line ends."""
    try:
        return cli.main(words)
    except SystemExit as exit:
        return exit.code


def error_of(words: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr of a command that ends with `code`."""
    assert code_of(words) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("pcl-fast: error: ")
    assert err.count("\n") == 1
    return err


def test_without_a_command_it_explains_itself_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    shown = capsys.readouterr().out
    assert cli.main(["--help"]) == cli.main(["-h"]) == 0
    assert capsys.readouterr().out == 2 * shown
    for command in cli.COMMANDS:
        assert f"\n  {command} " in shown


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"pcl-fast {__version__}\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trian"], "unknown command 'trian'. Did you mean 'train'?"),
        (["xyz"], "unknown command 'xyz'. There are: train, evaluate,"),
        (["train", "demmo"], "unknown preset 'demmo'. Did you mean 'demo'?"),
        (["train", "cifar100-resnet23"], "Did you mean 'cifar100-resnet32'?"),
        (["train", "xyz"], "unknown preset 'xyz'. There are: demo, gain,"),
        (["train", "demo", "--model", "resnet9", "--data.backend", "synthetic"], "Did you mean 'resnet8'?"),
        (["train", "demo", "--device", "gpu"], "--device gpu: not a device; give auto, cpu"),
        (["train", "demo", "--method", "vanilla"], "preset 'demo' trains vanilla and pcl"),
        (["evaluate", "nowhere"], "nowhere: no run here (config.json is missing)"),
        (["fetch", "cifar11"], "Did you mean 'cifar10'?"),
    ],
)
def test_a_wrong_word_is_exit_2_and_the_nearest_right_one(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in error_of(words, 2, capsys)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--train.epoch", "3"], "--train.epochs"),
        (["--pcl.temprature", "3"], "--pcl.temperature"),
        (["--train.epochs", "0"], "--train.epochs 0: give at least 1"),
        (["--optim.lr", "-1"], "--optim.lr -1.0: give a positive number"),
        (["--pcl.num-peers", "9"], "--pcl.num-peers 9: give 1 to 8"),
        (["--train.epochs", "many"], "many"),
        (["--amp.dtype", "float8"], "bfloat16"),
    ],
)
def test_a_wrong_flag_is_exit_2_and_what_to_give_instead(
    flags: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one line, however narrow the terminal is."""
    monkeypatch.setenv("COLUMNS", "30")
    assert said in error_of(["train", "demo", *flags], 2, capsys)
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("evaluate", "missing from pcl-fast evaluate: PATH Folder of a run"),
        ("evaluate runs --what", "unrecognized options: --what. `pcl-fast evaluate --help` lists all flags"),
        ("fetch cifar10 twice", "unrecognized options: twice"),
        ("reproduce cifar", "Expected one of ('cifar10', 'cifar100', 'imagenet', 'ablation')"),
        ("convert imagefolder here", "missing from pcl-fast convert imagefolder: DST"),
        ("verify a.beton --sheets b", "Did you mean '--sheet'?"),
        ("profile demo --profile.step 3", "Did you mean '--profile.steps'?"),
        ("profile data a.beton --view 1", "Did you mean '--views'?"),
        ("report --outt x", "Did you mean '--out'?"),
    ],
)
def test_every_command_says_in_one_line_what_it_cannot_read(
    words: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in error_of(words.split(), 2, capsys)


@pytest.mark.parametrize("words", [["train"], ["train", "--help"]])
def test_train_lists_every_preset(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of(words) == (0 if len(words) > 1 else 2)
    shown = capsys.readouterr().out
    for name in preset_names():
        if not name.endswith("-vanilla"):
            assert f"\n  {name} " in shown
    assert "NAME-vanilla" in shown


@pytest.mark.parametrize("command", ["train demo", "train cifar100-wrn20-8-vanilla", "evaluate", "fetch"])
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of([*command.split(), "--help"]) == 0
    shown = capsys.readouterr().out
    assert f"usage: pcl-fast {command}" in shown
    if command.startswith("train"):
        for flag in ("--optim.lr", "--pcl.num-peers", "--train.epochs", "--run-dir", "--no-resume"):
            assert flag in shown


def test_missing_data_is_exit_3_and_names_the_command_that_fetches_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    said = error_of(["train", "demo"], 3, capsys)
    assert "data_batch_1.bin is missing" in said
    assert "run `pcl-fast fetch cifar10`" in said
    assert list(Path().iterdir()) == [], "no run folder was made"


def test_imagenet_needs_its_images(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--data.train is missing: give --data.train" in error_of(["train", "imagenet-r18"], 2, capsys)


def test_a_run_that_diverges_is_exit_4(capsys: pytest.CaptureFixture[str]) -> None:
    """With a learning rate of 1e30 it truly does."""
    assert code_of([*SYNTHETIC, "--optim.lr", "1e30"]) == 4
    err = capsys.readouterr().err
    assert err.startswith("pcl-fast: error: step ")
    assert "not finite: ce/peer1" in err
    assert "lower --optim.lr" in err
    assert not list(Path("run").rglob("*.pt"))


def test_other_settings_in_the_same_folder_are_exit_2_with_the_difference(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert code_of([*SYNTHETIC, "--optim.lr", "1e30"]) == 4
    capsys.readouterr()
    assert code_of([*SYNTHETIC, "--optim.lr", "1e29", "--seed", "5"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert "--no-resume to move it aside" in lines[0]
    assert [line.strip() for line in lines[1:]] == ["optim.lr: 1e+30 -> 1e+29", "seed: 0 -> 5"]


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory.\nmore"), 1, "halve --train.batch-size"),
        (KeyboardInterrupt(), 130, "interrupted; what was not saved before is lost"),
        (PermissionError(13, "Permission denied", "runs/demo"), 1, "Permission denied: 'runs/demo'"),
        (Preempted("stopped by SIGTERM after step 3"), 75, "\nto go on:  pcl-fast train demo --seed 3\n"),
    ],
)
def test_whatever_else_ends_a_command_is_said_in_a_line(
    error: BaseException,
    code: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The command to go on with is the same one, without what would begin anew."""

    def fail(words: list[str]) -> None:
        raise error

    monkeypatch.setattr(train_command, "main", fail)
    assert cli.main(["train", "demo", "--no-resume", "--seed", "3"]) == code
    err = capsys.readouterr().err
    assert said in err
    assert "Traceback" not in err


@pytest.mark.parametrize(("on_path", "said"), [(True, "pcl-fast"), (False, ".venv/bin/pcl-fast")])
def test_the_command_to_go_on_with_is_one_the_shell_finds(
    on_path: bool, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program = Path(".venv/bin/pcl-fast")
    program.parent.mkdir(parents=True)
    program.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(program.parent.resolve()) if on_path else "")
    monkeypatch.setattr("sys.argv", [str(program), "train", "demo"])

    def stop(words: list[str]) -> None:
        raise Preempted("stopped by SIGINT after step 3")

    monkeypatch.setattr(train_command, "main", stop)
    assert cli.main() == 75
    assert capsys.readouterr().err.endswith(f"\nto go on:  {said} train demo\n")


def test_a_run_folder_that_is_a_file_is_said_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    Path("run").write_text("mine")
    assert "run" in error_of(SYNTHETIC, 1, capsys)
    assert Path("run").read_text() == "mine"
