"""A data set that is not what it should be stops a command before it makes a run."""

import os
from pathlib import Path

import pytest

from datasets_prep.cifar import CIFAR10
from pcl_fast import cli


def test_a_cut_data_file_is_exit_3_and_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "data" / CIFAR10.folder
    folder.mkdir(parents=True)
    for batch in CIFAR10.batches:
        (folder / batch.file).touch()
        os.truncate(folder / batch.file, 30_730_000)
    os.truncate(folder / "data_batch_4.bin", 30_000_000)
    assert cli.main(["train", "demo", "--data.root", "data"]) == 3
    said = capsys.readouterr().err
    assert "data_batch_4.bin has 30000000 bytes, not 30730000; run `pcl-fast fetch cifar10`" in said
    assert said.count("\n") == 1
    assert not (tmp_path / "runs").exists()
