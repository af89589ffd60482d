"""With which ranks and batches a run may go on: those with its global batch."""

from dataclasses import replace
from pathlib import Path

import pytest

from pcl_fast.errors import ConfigError
from pcl_fast.run_folder import RunFolder
from tests.dist.parts import config_of


@pytest.fixture
def begun(tmp_path: Path) -> RunFolder:
    """A folder in which two ranks with four images each have begun."""
    folder = RunFolder(tmp_path / "run")
    folder.claim(config_of(2)).close()
    return folder


@pytest.mark.parametrize(("ranks", "given", "fits"), [(1, 4, 8), (4, 4, 2), (8, 4, 1), (1, 8, 8), (2, 4, 4)])
def test_a_run_keeps_its_global_batch(begun: RunFolder, ranks: int, given: int, fits: int) -> None:
    config = begun.fitting(config_of(ranks, train={"batch_size": given}))
    assert config.train.batch_size == fits
    begun.claim(config).close()
    assert begun.read_config() == config_of(2)


def test_ranks_that_cannot_share_it_are_refused(begun: RunFolder) -> None:
    config = config_of(3, train={"batch_size": 4})
    with pytest.raises(ConfigError, match=r"its 8 images a step cannot be shared evenly by 3 ranks"):
        begun.fitting(config)
    assert replace(config, resume=False) == begun.fitting(replace(config, resume=False))


@pytest.mark.parametrize(("ranks", "given"), [(2, 8), (1, 16), (1, 2), (4, 8)])
def test_another_batch_size_is_refused(begun: RunFolder, ranks: int, given: int) -> None:
    config = begun.fitting(config_of(ranks, train={"batch_size": given}))
    with pytest.raises(ConfigError, match=rf"(?s)other settings.*train\.batch_size: 4 .*{given}"):
        begun.claim(config)
    assert begun.read_config() == config_of(2)
