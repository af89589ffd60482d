"""Fixtures of this folder."""

from pathlib import Path

import pytest

from tests.tiny import train


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny run that nothing interrupted."""
    path = tmp_path_factory.mktemp("straight") / "run"
    train(path)
    return path
