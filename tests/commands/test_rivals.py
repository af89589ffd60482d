"""The rivals on the command line: their names, their figures, and what of them cannot be."""

import json
import re
from pathlib import Path

import pytest
import torch

from pcl_fast.cli import main
from pcl_fast.objectives import METHODS
from tests.commands.test_config import row_of

PRESET = "cifar10-resnet32"
RIVALS = [method for method in METHODS if method not in ("pcl", "vanilla", "kd")]
SMALL = ["--model", "resnet8", "--device", "cpu", "--amp.dtype", "float32", "--data.subset", "32"]
SMALL += ["--train.batch-size", "16", "--train.epochs", "2"]


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    torch.set_num_threads(1)


def refusal(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a command says that ends with 2, in one line."""
    assert main(words) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    return said.err


@pytest.mark.parametrize("command", ["train", "config", "plan", "profile"])
def test_a_method_nobody_has(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = refusal([command, PRESET, "--method", "okdip"], capsys)
    assert "--method okdip: unknown. Did you mean 'okddip'?" in said
    said = refusal([command, PRESET, "--method", "zzz"], capsys)
    assert f"There are: {', '.join(METHODS)}." in said


@pytest.mark.parametrize("command", ["train", "config", "plan", "profile"])
def test_help_names_every_method(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")  # of one column
    with pytest.raises(SystemExit) as ended:
        main([command, PRESET, "--help"])
    assert ended.value.code == 0
    described = re.search(r"--method STR (.*?)\(default", capsys.readouterr().out, re.DOTALL)
    assert described is not None
    assert set(re.findall(r"\w+", described[1])) >= METHODS.keys()


@pytest.mark.parametrize(("method", "fix"), [("dml", "--dml.no-separate"), ("kdcl", "--kdcl.no-separate")])
def test_networks_that_share_nothing_are_not_split(
    method: str, fix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["config", PRESET, "--device", "cpu", "--method", method]
    said = refusal([*words, "--split", "stage2"], capsys)
    assert f"--split stage2: the networks of --method {method} share nothing; leave it out" in said
    assert fix in said
    learnt: list[str] = []
    for more in ([], ["--split", "none"], [fix], [fix, "--split", "stage2"]):
        assert main([*words, *more]) == 0
        learnt.append(row_of("parameters trained", capsys.readouterr().out))
    assert learnt[0] == learnt[1] == f"{3 * 466_906:,}"
    sizes = [int(each.replace(",", "")) for each in learnt]
    assert sizes[0] > sizes[3] > sizes[2]


def test_the_ramp_up_is_shown_where_there_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    shown: dict[str, bool] = {}
    for method in METHODS:
        assert main(["config", PRESET, "--device", "cpu", "--model", "resnet8", "--method", method]) == 0
        said = capsys.readouterr().out
        assert f"{method}: resnet8 on cifar10" in said
        shown[method] = "w rises to 1 over 80 epochs" in said
        assert ("EMA coefficient" in said) == (method == "pcl")
    assert {method for method, seen in shown.items() if seen} == {"one", "okddip", "ffl", "pcl"}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--method", "okddip", "--okddip.num-peers", "8"], "--okddip.num-peers 8: give 2 to 7"),
        (["--method", "one", "--one.num-peers", "1"], "--one.num-peers 1: give 2 to 8"),
        (["--method", "cl", "--cl.beta", "0"], "--cl.beta 0.0: give a share"),
    ],
)
def test_an_option_that_cannot_be(flags: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert refusal(["config", PRESET, *flags], capsys).startswith(f"pcl-fast: error: {said}")


@pytest.mark.usefixtures("small_cifar")
@pytest.mark.parametrize(
    ("method", "names"),
    [
        ("okddip", {"peer4 = OKDDip", "ensemble = OKDDip-E", "peer1"}),
        ("ffl", {"peer1 = FFL-S", "ensemble = FFL"}),
    ],
)
def test_trained_evaluated_and_not_gone_on_with_by_another(
    method: str, names: set[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = tmp_path / "run", tmp_path / "found.json"
    words = ["train", PRESET, *SMALL, "--run-dir", str(run)]
    assert main([*words, "--method", method]) == 0
    trained = capsys.readouterr().out
    assert "top-1 after epoch 2: " + ("OKDDip" if method == "okddip" else "FFL-S") in trained
    assert main(["evaluate", str(run), "--device", "cpu", "--json", str(out)]) == 0
    rows = {cell.strip() for cell in re.split(r"[│┃\n]", capsys.readouterr().out)}
    assert names <= rows
    heads = next(iter(json.loads(out.read_text()).values()))
    peers = 4 if method == "okddip" else 3
    assert heads.keys() == {*(f"peer{j + 1}" for j in range(peers)), "ensemble", "between"}
    for other in ("pcl", "one"):
        assert main([*words, "--method", other]) == 2
        assert f"method: {method} -> {other}" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["one", "kdcl"])
def test_its_speed_beside_the_straightforward_one(
    method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "speed.json"
    words = ["profile", PRESET, "--method", method, "--model", "resnet8", "--device", "cpu"]
    words += ["--data.backend", "synthetic", "--train.batch-size", "8", "--json", str(out)]
    assert main([*words, "--repeats", "1", "--steps", "1", "--warmup", "1"]) == 0
    found = json.loads(out.read_text())[method]
    assert list(found["variants"]) == ["baseline", "baseline-amp", "eager"]
    assert all(variant["refused"] is None for variant in found["variants"].values())
    assert f"{method}: resnet8, batch 8 x {3 if method == 'kdcl' else 1} view" in capsys.readouterr().out


def test_the_speed_of_two_stages_needs_the_first(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["profile", PRESET, "--device", "cpu", "--data.backend", "synthetic"]
    assert "needs its teacher; give --kd.teacher" in refusal([*words, "--method", "kd"], capsys)


def test_a_plan_counts_what_a_method_has(tmp_path: Path) -> None:
    """Separate networks have more gradients to add up; a head with norms has statistics of its own."""
    found: dict[str, dict[str, int]] = {}
    for method in ("vanilla", "cl", "ffl", "dml"):
        out = tmp_path / f"{method}.json"
        assert main(["plan", "imagenet-r18-node", "--method", method, "--json", str(out)]) == 0
        found[method] = json.loads(out.read_text())[method]["exchange"]
    plain = 11_689_512
    assert found["vanilla"]["gradients"] == 4 * plain
    assert found["dml"]["gradients"] == 3 * 4 * plain
    assert found["dml"]["statistics"] == 3 * found["vanilla"]["statistics"]
    # two norms, over the three last maps of 512 channels and over one
    assert found["ffl"]["statistics"] - found["cl"]["statistics"] == 4 * 2 * (1536 + 512)
    fusion = 9 * 1536 + 2 * 1536 + 1536 * 512 + 2 * 512 + 512 * 1000 + 1000
    assert found["ffl"]["gradients"] - found["cl"]["gradients"] == 4 * fusion
