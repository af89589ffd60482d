"""`pcl-fast profile data` on a small file: every loader is measured, and what cannot be is said."""

import json
import sys
import threading
from pathlib import Path

import pytest
import torch

from pcl_fast.cli import main
from pcl_fast.commands.profile.data import fit_window, open_loader
from pcl_fast.commands.profile.data_arguments import HOST, STOCK, DataArguments
from pcl_fast.errors import ConfigError, DataError
from tests.datasets_prep.pictures import convert_folder, write_folder

IMAGES = 60
SMALL = ("--image-size", "16", "--workers", "1", "--batches", "3", "--repeats", "2")


@pytest.fixture(scope="module")
def beton(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_folder(tmp_path_factory.mktemp("photos") / "folder", images=IMAGES)
    path = folder.parent / "photos.beton"
    convert_folder(folder, path)
    return path


def test_loaders_are_measured_and_told(
    beton: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed: pip install 'pcl-fast[dali]'")
    out = tmp_path / "out.json"
    words = [
        "profile",
        "data",
        str(beton),
        "--backends",
        "dali,torch",
        "--views",
        "1,3",
        "--json",
        str(out),
        *SMALL,
    ]
    assert main(words) == 0
    printed, report = capsys.readouterr().out, json.loads(out.read_text())
    for name in ("dali", "torch"):
        views = report["loaders"][name]["views"]
        assert list(views) == ["0", "1", "3"]
        assert all(len(figures["images_per_second"]) == 2 for figures in views.values())
        assert all(0 < rate < 1e6 for figures in views.values() for rate in figures["images_per_second"])
        assert sum(report["loaders"][name]["shares"].values()) == pytest.approx(1)
        assert f"{name}: {report['loaders'][name]['verdict'][:20]}" in printed
    assert report["window"] == {"batch_size": 4, "lead": 4, "batches": 3}
    assert report["left_out"] == {}


def test_a_loader_that_is_not_installed_is_left_out(
    beton: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    words = ["profile", "data", str(beton), "--views", "1", *SMALL]
    assert main([*words, "--backends", "dali,torch"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "dali was left out: " in printed
    assert "pip install 'pcl-fast[dali]'" in printed
    assert "torch: started in" in printed
    assert main([*words, "--backends", "dali"]) == ConfigError.exit_code


def test_stock_ffcv_gives_a_view_a_pipeline(beton: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ffcv", reason="FFCV is not installed: pip install 'pcl-fast[ffcv]'")
    from ffcv.pipeline.compiler import Compiler

    monkeypatch.setattr(Compiler, "is_enabled", False)  # its own switch: compiling takes 20 seconds
    before, arguments = threading.active_count(), DataArguments(file=beton, workers=1, image_size=16)
    window = fit_window(arguments, IMAGES)
    batches = open_loader(arguments, window, STOCK, 2).epoch(0)
    first, labels, second = next(batches)
    assert first.shape == second.shape == (window.batch_size, 3, 16, 16)
    assert first.dtype == torch.float32
    assert 0.1 < float(first.std()) < 3
    assert not torch.equal(first, second)
    assert labels.shape == (window.batch_size, 1)
    assert sum(1 for _ in batches) == IMAGES // window.batch_size - 1
    assert threading.active_count() == before


def test_what_is_left_to_the_host_is_the_same_for_any_number_of_views(beton: Path) -> None:
    pytest.importorskip("ffcv", reason="FFCV is not installed: pip install 'pcl-fast[ffcv]'")
    arguments = DataArguments(file=beton, workers=1, image_size=16)
    window = fit_window(arguments, IMAGES)
    epochs = [open_loader(arguments, window, HOST, views).epoch(0) for views in (1, 4)]
    count = 0
    for few, many in zip(*epochs, strict=True):
        assert few.images_BHWC.shape == (window.batch_size, 48, 64, 3)
        assert torch.equal(few.images_BHWC, many.images_BHWC)
        assert torch.equal(few.ids_B, many.ids_B)
        count += len(few.labels_B)
    assert count == IMAGES


@pytest.mark.parametrize(
    ("flag", "value", "match"),
    [
        ("--backends", "dali,tensorflow", "--backends tensorflow: no such loader"),
        ("--backends", "dahli", "Did you mean 'dali'"),
        ("--views", "1,x", "--views 1,x: give numbers from 1 on"),
        ("--views", "0", "--views 0: give numbers from 1 on"),
        ("--repeats", "0", "--repeats 0: give at least 1"),
        ("--device", "tpu", "--device tpu: give cpu or cuda"),
    ],
)
def test_wrong_flags_are_refused(
    beton: Path, flag: str, value: str, match: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["profile", "data", str(beton), flag, value]) == ConfigError.exit_code
    assert match in " ".join(capsys.readouterr().err.split())


def test_too_few_images_are_told_with_what_would_do(beton: Path) -> None:
    with pytest.raises(DataError, match=r"too few to measure 64 workers.*--workers 13"):
        fit_window(DataArguments(file=beton, workers=64), IMAGES)
    assert fit_window(DataArguments(file=beton, workers=13), IMAGES).batches >= 1
    assert fit_window(DataArguments(file=beton, workers=8), 1_281_167).batch_size == 64
