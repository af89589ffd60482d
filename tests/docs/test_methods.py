"""docs/methods.md: its method of one's own is trained as it stands there, its costs are up to date."""

import dataclasses
import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

from pcl_fast.config import Config
from pcl_fast.device import resolve
from pcl_fast.figures import RunFigures, run_figures
from pcl_fast.objectives import METHODS, make_objective
from pcl_fast.presets import find_preset
from pcl_fast.sinks import read_records
from tests.commands.conftest import cifar_folder, small_cifar
from tests.conftest import REPOSITORY

__all__ = ["cifar_folder", "small_cifar"]  # fixtures

PAGE = REPOSITORY / "docs" / "methods.md"
BEGIN, END = "<!-- cost: kept up to date by tests/docs/test_methods.py -->\n", "<!-- end of cost -->"
CODE = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


def run_script(path: Path, *words: str) -> int:
    """`python path words...`, in this process: its exit code."""
    before = sys.argv
    sys.argv = [str(path), *words]
    try:
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(path), run_name="__main__")
    finally:
        sys.argv = before
        METHODS.pop("mean", None)
    code = ended.value.code
    assert isinstance(code, int)
    return code


@pytest.mark.usefixtures("small_cifar")
def test_a_method_of_one_s_own_in_thirty_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert CODE is not None
    assert len(CODE[1].splitlines()) <= 30
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    script = tmp_path / "mean.py"
    script.write_text(CODE[1])
    flags = ["cifar10-resnet32", "--method", "mean", "--model", "resnet8", "--device", "cpu"]
    flags += ["--amp.dtype", "float32", "--data.subset", "48", "--train.batch-size", "16"]
    flags += ["--train.epochs", "2", "--pcl.rampup-epochs", "0"]
    assert run_script(script, "train", *flags) == 0
    run = tmp_path / "runs" / "cifar10-resnet32-mean-seed0"
    assert "mean " in capsys.readouterr().out
    last = read_records(run / "metrics.jsonl")[-1]
    assert last["val"].keys() == {"peer1", "peer2", "peer3"}
    assert last["terms"]["kl/peer2"] > 0
    assert last["step"] == 6
    assert (run / "model.safetensors").is_file()
    assert run_script(script, "evaluate", str(run), "--device", "cpu", "--json", "found.json") == 0
    assert "peer1 = mean" in capsys.readouterr().out
    found = json.loads((tmp_path / "found.json").read_text())
    assert next(iter(found.values()))["peer1"] == last["val"]["peer1"]
    assert run_script(script, "config", *flags) == 0
    assert "x 3 views" in capsys.readouterr().out
    assert run_script(script, "config", "cifar10-resnet32", "--method", "meen") == 2
    assert "Did you mean 'mean'?" in capsys.readouterr().err


def figures_of(method: str) -> tuple[Config, RunFigures]:
    config = resolve(dataclasses.replace(find_preset("cifar100-resnet32").config, device="cpu"))
    config = dataclasses.replace(config, method=method)
    return config, run_figures(config)


def cost_table() -> str:
    """A row a method, in Markdown."""
    alone = figures_of("vanilla")[1]
    rows = [
        "| `--method` | networks or branches | views | parameters that learn | of vanilla | "
        "FLOPs an image and step | of vanilla |",
        "|---|---|---|---|---|---|---|",
    ]
    for method in METHODS:
        config, figures = figures_of(method)
        objective = make_objective(config)
        parameters, flops = figures.trained_parameters, figures.train_flops_per_image
        kind = "branches" if objective.shares_trunk else "networks"
        peers = f"{objective.num_peers} {kind}" if objective.num_peers > 1 else "1 network"
        rows.append(
            f"| `{method}` | {peers} | {figures.views_per_image} | {parameters:,} | "
            f"{parameters / alone.trained_parameters:.2f} | {flops / 1e9:.3f} G | "
            f"{flops / alone.train_flops_per_image:.2f} |"
        )
    return "\n".join(rows) + "\n"


@pytest.mark.timeout(120)  # nine networks of 32 layers are built and walked through
def test_the_table_of_costs_is_what_the_code_says() -> None:
    written = PAGE.read_text().partition(BEGIN)[2].partition(END)[0].strip()
    expected = cost_table().strip()
    assert written == expected, f"{PAGE.name}: put this between its two comments:\n{expected}"


def test_every_method_is_on_the_page() -> None:
    described = set(re.findall(r"^\| `(\w+)` \|.*CE\(", PAGE.read_text(), re.MULTILINE))
    assert described == METHODS.keys()
