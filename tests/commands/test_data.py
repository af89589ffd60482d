"""The loaders that a configuration opens for each of its ranks."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from pcl_fast.commands.data import fit_to_data, opened_data, opened_val
from pcl_fast.config import Config, DataConfig, TrainConfig
from pcl_fast.device import resolve
from pcl_fast.errors import ConfigError
from tests.datasets_prep.pictures import convert_folder, write_folder

IMAGES, VIEWS, GLOBAL_BATCH = 26, 2, 8


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("photos")
    write_folder(path / "photos", images=IMAGES)
    convert_folder(path / "photos", path / "photos.beton")
    return path / "photos.beton"


@pytest.fixture
def configs(photos: Path, small_cifar: None) -> dict[str, DataConfig]:
    pictures: dict[str, Any] = {"dataset": "imagenet", "train": photos, "val": photos, "image_size": 12}
    return {
        "resident": DataConfig(),
        "synthetic": DataConfig(backend="synthetic", subset=48),
        "torch": DataConfig(backend="torch", workers=0, **pictures),
    }


def configured(data: DataConfig, ranks: int | None) -> Config:
    train = TrainConfig(batch_size=GLOBAL_BATCH // (ranks or 1), eval_batch_size=6)
    config = Config(data=data, train=train, ranks=ranks, device="cpu")
    return resolve(fit_to_data(config))


@pytest.mark.parametrize("backend", ["resident", "synthetic", "torch"])
def test_every_rank_opens_its_share(configs: dict[str, DataConfig], backend: str) -> None:
    config = configured(configs[backend], ranks=2)
    with opened_data(config, VIEWS) as first, opened_data(config, VIEWS, rank=1) as second:
        for batches in zip(first.train.epoch(1), second.train.epoch(1), strict=True):
            ids = torch.cat([batch.sample_ids_B for batch in batches])
            assert len(ids.unique()) == GLOBAL_BATCH
            assert {len(batch.labels_B) for batch in batches} == {GLOBAL_BATCH // 2}
        assert first.val.num_samples == second.val.num_samples
        counts = [sum(len(batch.labels_B) for batch in data.val) for data in (first, second)]
        assert sum(counts) == first.val.num_samples
        assert abs(counts[0] - counts[1]) <= 1


@pytest.mark.parametrize("backend", ["resident", "torch"])
def test_global_batches_are_those_of_one_process(configs: dict[str, DataConfig], backend: str) -> None:
    alone, shared = (configured(configs[backend], ranks) for ranks in (None, 2))
    with (
        opened_data(alone, VIEWS) as data,
        opened_data(shared, VIEWS) as first,
        opened_data(shared, VIEWS, rank=1) as second,
    ):
        parts = zip(first.train.epoch(0), second.train.epoch(0), strict=True)
        for whole, batches in zip(data.train.epoch(0), parts, strict=True):
            joined = torch.cat([batch.views_VBCHW for batch in batches], 1)
            assert torch.equal(joined, whole.views_VBCHW)


@pytest.mark.parametrize("backend", ["resident", "synthetic", "torch"])
def test_a_process_alone_evaluates_on_everything(configs: dict[str, DataConfig], backend: str) -> None:
    """Also a run that several ranks trained."""
    config = configured(configs[backend], ranks=2)
    with opened_val(config) as val:
        assert sum(len(batch.labels_B) for batch in val) == val.num_samples


def test_views_grow_and_evaluation_does_not(configs: dict[str, DataConfig]) -> None:
    for backend in ("torch", "synthetic"):
        data = dataclasses.replace(configs[backend], image_size=96, resize_from=32, resize_until=0.5)
        config = configured(data, ranks=None)
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, epochs=8))
        with opened_data(config, VIEWS) as opened:
            for epoch, size in enumerate((32, 64, 64, 96, 96)):  # 32, 48, 64, 80, then 96
                assert next(opened.train.epoch(epoch)).views_VBCHW.shape[3:] == (size, size)
            assert next(iter(opened.val)).images_BCHW.shape[2:] == (96, 96)


def test_only_decoded_images_grow(configs: dict[str, DataConfig]) -> None:
    data = dataclasses.replace(configs["resident"], resize_from=32)
    with pytest.raises(ConfigError, match=r"--data\.resize-from 32: for images that are decoded"):
        configured(data, ranks=None)


@pytest.mark.parametrize("backend", ["resident", "synthetic", "torch"])
def test_cutout_is_around_every_backend(configs: dict[str, DataConfig], backend: str) -> None:
    config = configured(configs[backend], ranks=None)
    changed = dataclasses.replace(config, data=dataclasses.replace(config.data, cutout=8))
    with opened_data(config, VIEWS) as plain, opened_data(changed, VIEWS) as cut:
        for before, after in zip(plain.train.epoch(1), cut.train.epoch(1), strict=True):
            gone = (after.views_VBCHW == 0) & (before.views_VBCHW != 0)
            assert gone.any(dim=(2, 3, 4)).all(), "of every view"
            assert torch.equal(after.views_VBCHW, before.views_VBCHW.masked_fill(gone, 0.0))
        for before, after in zip(plain.val, cut.val, strict=True):
            assert torch.equal(before.images_BCHW, after.images_BCHW)


@pytest.mark.parametrize("backend", ["resident", "torch"])
def test_colours_are_jittered_where_images_have_any(configs: dict[str, DataConfig], backend: str) -> None:
    jittered = {name: dataclasses.replace(data, color_jitter=0.4) for name, data in configs.items()}
    config, changed = configured(configs[backend], None), configured(jittered[backend], None)
    with opened_data(config, VIEWS) as plain, opened_data(changed, VIEWS) as other:
        before, after = (next(iter(data.train.epoch(1))).views_VBCHW for data in (plain, other))
        assert ((before - after).abs().amax((2, 3, 4)) > 0.01).all()
    with pytest.raises(ConfigError, match=r"--data.color-jitter 0.4: synthetic images have no colours"):
        configured(jittered["synthetic"], None)
