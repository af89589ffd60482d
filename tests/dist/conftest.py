"""Fixtures of this folder."""

from pathlib import Path

import pytest

from tests.dist.training import codes, run, said, training, write_photos


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.beton and val.beton."""
    return write_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def straight(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a training on two ranks that nothing disturbed."""
    folder = tmp_path_factory.mktemp("straight")
    outcomes = run(folder, training(photos, folder / "run"))
    assert codes(outcomes) == [0, 0], said(outcomes)
    return folder / "run"
