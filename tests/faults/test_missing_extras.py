"""Without FFCV or DALI: one line that says how to install it, and everything else works."""

import sys
from pathlib import Path

import pytest

from pcl_fast import cli
from tests.datasets_prep.pictures import convert_folder, write_folder

LIBRARIES = {"ffcv": ("ffcv", "numba"), "dali": ("nvidia", "nvidia.dali")}
SMALL = "--model resnet8 --data.image-size 16 --train.batch-size 4 --train.epochs 1 --device cpu"


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Eight pictures in a .beton; none of the libraries can be imported."""
    for module in [name for names in LIBRARIES.values() for name in names]:
        monkeypatch.setitem(sys.modules, module, None)
    for module in [name for name in sys.modules if name.startswith(("pipelines.ffcv", "pipelines.dali"))]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "photos", images=8)
    convert_folder(tmp_path / "photos", tmp_path / "photos.beton")
    return tmp_path / "photos.beton"


def train(photos: Path, backend: str) -> int:
    paths = ["--data.train", str(photos), "--data.val", str(photos), "--data.workers", "0"]
    return cli.main(["train", "imagenet-r18", *paths, "--data.backend", backend, *SMALL.split()])


@pytest.mark.parametrize("backend", ["ffcv", "dali"])
def test_the_install_line_is_told(photos: Path, backend: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(photos, backend) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"pcl-fast: error: --data.backend {backend}")
    assert f"pip install 'pcl-fast[{backend}]'" in said
    assert said.count("\n") == 1
    assert not Path("runs").exists(), "nothing was begun"


def test_the_rest_works(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(photos, "torch") == 0
    assert "top-1 after epoch 1" in capsys.readouterr().out
