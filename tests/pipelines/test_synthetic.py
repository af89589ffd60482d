"""The synthetic loaders serve noise of the size asked for."""

from dataclasses import replace

import pytest
import torch

from pcl_fast.contract import EvalLoader, TrainLoader
from pcl_fast.errors import ConfigError
from pipelines.synthetic import SyntheticEvalLoader, SyntheticOptions, SyntheticTrainLoader

OPTIONS = SyntheticOptions(
    num_samples=11,
    num_classes=7,
    image_size=20,
    batch_size=4,
    seed=3,
    device=torch.device("cpu"),
    num_views=2,
    channels_last=True,
)


def test_training_serves_one_batch_every_step() -> None:
    loader: TrainLoader = SyntheticTrainLoader(OPTIONS)
    batches = list(loader.epoch(5))
    assert loader.num_samples == 11
    assert len(batches) == loader.steps_per_epoch == 2
    assert batches[0].views_VBCHW.shape == (2, 4, 3, 20, 20)
    assert batches[0].views_VBCHW.data_ptr() == batches[1].views_VBCHW.data_ptr()
    assert batches[0].sample_ids_B.tolist() == [0, 1, 2, 3]
    assert len(list(loader.epoch(5, 1))) == 1
    assert list(loader.epoch(5, 2)) == []


@pytest.mark.parametrize("channels_last", [False, True])
def test_noise_is_normal_and_laid_out_as_asked(channels_last: bool) -> None:
    options = replace(OPTIONS, batch_size=64, num_samples=64, channels_last=channels_last)
    (batch,) = SyntheticTrainLoader(options).epoch(0)
    images, layout = batch.views_VBCHW, torch.channels_last if channels_last else torch.contiguous_format
    assert images.flatten(0, 1).is_contiguous(memory_format=layout)
    assert abs(images.mean()) < 5 / images.numel() ** 0.5
    assert images.std().item() == pytest.approx(1, abs=0.02)
    assert batch.labels_B.unique().tolist() == list(range(7))


def test_seeds_decide() -> None:
    first, again = (next(iter(SyntheticTrainLoader(OPTIONS).epoch(0))) for _ in range(2))
    other = next(iter(SyntheticTrainLoader(replace(OPTIONS, seed=4)).epoch(0)))
    assert torch.equal(first.views_VBCHW, again.views_VBCHW)
    assert torch.equal(first.labels_B, again.labels_B)
    assert not torch.equal(first.views_VBCHW, other.views_VBCHW)


@pytest.mark.parametrize(("num_samples", "sizes"), [(11, [4, 4, 3]), (8, [4, 4]), (1, [1])])
def test_evaluation_counts_exactly(num_samples: int, sizes: list[int]) -> None:
    loader: EvalLoader = SyntheticEvalLoader(replace(OPTIONS, num_samples=num_samples))
    batches = list(loader)
    assert loader.num_samples == num_samples
    assert [len(b.images_BCHW) for b in batches] == [len(b.labels_B) for b in batches] == sizes
    assert batches[0].images_BCHW.is_contiguous(memory_format=torch.channels_last)


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(ConfigError, match="3 synthetic samples do not fill one batch of 4"):
        SyntheticTrainLoader(replace(OPTIONS, num_samples=3))
    with pytest.raises(ConfigError, match="image_size of the synthetic data is 0"):
        replace(OPTIONS, image_size=0)
    with pytest.raises(ConfigError, match="step 3: it has 2 steps"):
        SyntheticTrainLoader(OPTIONS).epoch(0, 3)


def of_ranks(world_size: int, **changes: int) -> list[SyntheticOptions]:
    return [replace(OPTIONS, rank=rank, world_size=world_size, **changes) for rank in range(world_size)]


def test_ranks_have_noise_and_samples_of_their_own() -> None:
    loaders = [SyntheticTrainLoader(options) for options in of_ranks(2)]
    assert {loader.steps_per_epoch for loader in loaders} == {1}
    first, second = (next(loader.epoch(0)) for loader in loaders)
    assert torch.equal(first.views_VBCHW, next(SyntheticTrainLoader(OPTIONS).epoch(0)).views_VBCHW)
    assert not torch.equal(first.views_VBCHW, second.views_VBCHW)
    assert [batch.sample_ids_B.tolist() for batch in (first, second)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    with pytest.raises(ConfigError, match="11 synthetic samples do not fill one batch of 12"):
        SyntheticTrainLoader(of_ranks(3)[0])


def test_ranks_of_neighbouring_seeds_have_other_noise() -> None:
    one, other = SyntheticTrainLoader(of_ranks(2)[1]), SyntheticTrainLoader(replace(OPTIONS, seed=4))
    assert not torch.equal(one.batch.views_VBCHW, other.batch.views_VBCHW)


@pytest.mark.parametrize("num_samples", [1, 2, 11, 30])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_evaluate_exactly_so_many_together(num_samples: int, world_size: int) -> None:
    loaders = [SyntheticEvalLoader(options) for options in of_ranks(world_size, num_samples=num_samples)]
    assert {loader.num_samples for loader in loaders} == {num_samples}
    counts = [sum(len(batch.labels_B) for batch in loader) for loader in loaders]
    assert sum(counts) == num_samples
    assert max(counts) - min(counts) <= 1


def test_epochs_of_other_sizes_have_noise_of_that_size() -> None:
    loader = SyntheticTrainLoader(replace(OPTIONS, epoch_sizes=(8, 12, 20)))
    for epoch, size in enumerate((8, 12, 20, 20)):
        first, second = loader.epoch(epoch)
        assert first is second
        alone = SyntheticTrainLoader(replace(OPTIONS, image_size=size)).batch
        assert torch.equal(first.views_VBCHW, alone.views_VBCHW)
        assert torch.equal(first.labels_B, alone.labels_B)
    assert not loader.is_even, "a graph holds one size only"
    assert SyntheticTrainLoader(replace(OPTIONS, epoch_sizes=(20,))).is_even
