"""How many images a core prepares: as measured by us, and from files of `pcl-fast profile data`."""

import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pcl_fast.config import Config
from pcl_fast.device import resolve
from pcl_fast.errors import ConfigError
from pcl_fast.presets import find_preset
from pcl_fast.profile.plan.feed import CORES, ENTRIES, RATES, find_feed
from tests.conftest import REPOSITORY

LOADERS = REPOSITORY / "docs" / "measurements" / "loaders.json"


def test_rates_of_a_core_are_those_measured() -> None:
    """What the code says of two cores is what docs/measurements/ has."""
    loaders = json.loads(LOADERS.read_text())["loaders"]
    for backend, rates in RATES.items():
        found = [loaders[ENTRIES[backend][0]]["views"][str(views)] for views in range(1, 5)]
        medians = [statistics.median(each["images_per_second"]) for each in found]
        assert rates == tuple(map(round, medians))


def image_config(**changes: Any) -> Config:
    config = resolve(dataclasses.replace(find_preset("imagenet-r18").config, device="cpu"))
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **changes))


def test_the_rate_of_a_core() -> None:
    feed = find_feed(image_config(), 3, None)
    assert feed is not None
    assert (feed.rate, feed.basis.kind) == (1241 / CORES, "projected")
    assert "docs/measurements.md" in feed.basis.source
    rates = [find_feed(image_config(backend="torch"), views, None) for views in (3, 4, 5, 8)]
    seconds = [1 / feed.rate for feed in rates if feed is not None]
    steps = np.diff(seconds) / (1, 1, 3)
    assert steps == pytest.approx([steps[0]] * 3)
    for backend in ("synthetic", "resident"):
        assert find_feed(image_config(backend=backend), 3, None) is None


def test_the_rate_of_a_core_from_a_file(tmp_path: Path) -> None:
    measured = find_feed(image_config(), 3, LOADERS)
    assert measured is not None
    assert measured.rate == pytest.approx(1241 / 2, rel=1e-3)
    assert measured.basis.kind == "measured"
    assert "loaders.json: ffcv-host, 2 workers, AMD EPYC" in measured.basis.source
    # Without what is left to the host, the loader whole; a worker that keeps more than a core busy.
    report = json.loads(LOADERS.read_text())
    del report["loaders"]["ffcv-host"]
    report["workers"] = 1
    path = tmp_path / "file.json"
    path.write_text(json.dumps(report))
    whole = find_feed(image_config(), 3, path)
    busy = statistics.median(report["loaders"]["ffcv"]["views"]["3"]["cores_busy"])
    assert whole is not None
    assert whole.rate == pytest.approx(803.1108 / busy)


@pytest.mark.parametrize(
    ("changes", "views", "said"),
    [
        ({"image_size": 160}, 3, "measured with views of 224 pixels, this run has 160"),
        ({}, 5, "measured with 1, 2, 3, 4 views of an image, this run has 5"),
    ],
)
def test_loaders_of_another_run(changes: dict[str, Any], views: int, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        find_feed(image_config(**changes), views, LOADERS)


@pytest.mark.parametrize("text", ["[]", "{", "{}", '{"loaders": {"ffcv": 3}}', '{"loaders": 5}'])
def test_files_that_are_something_else(tmp_path: Path, text: str) -> None:
    path = tmp_path / "some.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"some.json: not such a file; `pcl-fast profile data FILE"):
        find_feed(image_config(), 3, path)
    with pytest.raises(ConfigError, match=r"none.json cannot be read: No such file"):
        find_feed(image_config(), 3, tmp_path / "none.json")


def test_loaders_without_the_one_that_is_wanted(tmp_path: Path) -> None:
    path = tmp_path / "some.json"
    path.write_text(json.dumps({"loaders": {"torch": {}}}))
    with pytest.raises(ConfigError, match="measured torch, this run needs ffcv-host"):
        find_feed(image_config(), 3, path)
