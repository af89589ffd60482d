"""Ways of making a step: each is the step it says it is, and what cannot be says why."""

import dataclasses
import gc
import itertools
import time
import weakref
from typing import Any

import pytest
import torch
import torch._inductor.config as inductor
from torch._inductor.utils import fresh_cache

from pcl_fast.build import build_state
from pcl_fast.config import Config
from pcl_fast.contract import DeviceLoader, TrainLoader, ViewBatch
from pcl_fast.errors import ConfigError, DataError
from pcl_fast.first_batch import check_views
from pcl_fast.profile.baseline import BaselineStep, baseline_config
from pcl_fast.profile.noise import NoiseLoader
from pcl_fast.profile.variants import (
    KNOWN,
    LR,
    Variant,
    describe,
    open_loading,
    open_variant,
    variant_config,
)
from pcl_fast.step.state import TrainState
from pcl_fast.step.timetable import Timetable
from pcl_fast.step.train_step import train_step
from tests import tiny
from tests.step.tiny import make_batches, moment, tiny_config

ABLATIONS: dict[str, dict[str, Any]] = {
    "pcl": {},
    "one view": {"view_per_peer": False},
    "no ensemble teacher": {"ensemble_teacher": False},
    "no mean teachers": {"mean_teacher": False},
    "moved ensemble": {"detach_ensemble": False},
    "one peer": {"num_peers": 1},
    "five peers": {"num_peers": 5},
}


def vanilla(config: Config) -> Config:
    return dataclasses.replace(config, method="vanilla")


def state_of(variant: Variant) -> TrainState:
    assert variant._run is not None
    return variant._run._part.step.state  # pyright: ignore


def run_steps(variant: Variant, steps: int) -> None:
    for _ in range(steps):
        variant.step()


def doubled(batch: ViewBatch) -> ViewBatch:
    return dataclasses.replace(batch, views_VBCHW=batch.views_VBCHW.double())


@pytest.mark.parametrize("case", [*ABLATIONS, "vanilla"])
def test_the_baseline_is_the_same_method(case: str) -> None:
    """In float64 its losses and weights are those of our step, which is another program."""
    config = vanilla(tiny_config()) if case == "vanilla" else tiny_config(**ABLATIONS[case])
    state, baseline = build_state(config, torch.float64), BaselineStep(baseline_config(config))
    baseline.network.double()
    if baseline.teacher is not None:
        baseline.teacher.double()
    batches = [doubled(batch) for batch in make_batches(4, views=state.objective.num_views)]
    for index, batch in enumerate(batches, start=1):
        ours, theirs = train_step(state, batch, moment(index)), baseline(batch, moment(index))
        torch.testing.assert_close(ours.terms.sum(), theirs, rtol=1e-10, atol=0)
    networks = [(state.network, baseline.network)]
    if state.mean_teacher is not None:
        assert baseline.teacher is not None
        networks.append((state.mean_teacher.network, baseline.teacher))
    for mine, other in networks:
        for ours, theirs in zip(mine.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


def test_the_baseline_with_amp_computes_in_bfloat16() -> None:
    config = baseline_config(tiny_config("float32"), amp=True)
    assert (config.amp.dtype, config.channels_last, config.pcl.trunk_views) == ("bfloat16", "on", "loop")
    amp, plain = BaselineStep(config), BaselineStep(baseline_config(tiny_config("float32")))
    weight = next(amp.network.parameters())
    assert weight.dtype == torch.float32
    assert weight.is_contiguous(memory_format=torch.channels_last)
    batch = make_batches(1)[0]
    losses = [step(batch, moment(1)) for step in (amp, plain)]
    assert 1e-6 < abs(losses[0] / losses[1] - 1) < 0.03


def test_ours_trains_as_the_step_does() -> None:
    """The schedules of the run at each step, but for the learning rate; bitwise."""
    config = tiny_config()
    variant = open_variant("eager", config)
    run_steps(variant, 5)
    state, timetable = build_state(config), Timetable(variant.config, 12_500, torch.device("cpu"))
    batch = NoiseLoader(variant.config).batch
    for step in range(1, 6):
        assert timetable.on_host(step).lr == LR
        train_step(state, batch, timetable.on_host(step))
    tiny.assert_bitwise_equal(state_of(variant).arena.buffers.values, state.arena.buffers.values)
    variant.close()


@pytest.mark.parametrize("name", ["baseline", "baseline-amp", "eager"])
def test_the_loader_s_batches_are_trained_on_run_after_run(name: str) -> None:
    """Two epochs of four steps, and on: the schedules begin anew with each run."""
    config = tiny.tiny_config()
    own = variant_config(name, config)
    loader = Recording(tiny.tiny_data(own).train)
    variant = open_variant(name, config, loader)
    assert variant.warm_up(3) > 0
    run_steps(variant, 2 * tiny.STEPS)
    assert loader.epochs == [0, 1, 0, 1, 0]
    variant.check()
    assert variant.refused is None
    if name == "eager":
        assert int(variant._run._part.step.steps_done) == 3  # pyright: ignore
    variant.close()


class Recording:
    """A loader that says which epochs were asked for; its batches come from the host."""

    def __init__(self, loader: TrainLoader) -> None:
        self.loader, self.epochs = loader, list[int]()
        self.num_samples, self.steps_per_epoch = loader.num_samples, loader.steps_per_epoch

    def epoch(self, epoch: int, first_step: int = 0) -> Any:
        self.epochs.append(epoch)
        return self.loader.epoch(epoch, first_step)


@pytest.mark.parametrize("on_device", [True, False])
def test_loading_makes_every_batch_and_trains_on_none(on_device: bool) -> None:
    config = tiny.tiny_config()
    train = tiny.tiny_data(config).train
    assert isinstance(train, DeviceLoader)
    loader = train if on_device else Recording(train)
    variant = open_loading("eager", config, loader)
    assert variant.warm_up(2) > 0
    run_steps(variant, tiny.STEPS)
    variant.close()
    if on_device:
        assert int(train._step) == 2, "two steps into an epoch"  # pyright: ignore
    else:
        assert loader.epochs == [0, 1, 0]  # pyright: ignore


@pytest.mark.parametrize("name", ["captured", "captured-compiled"])
def test_without_a_gpu_there_are_no_graphs(name: str) -> None:
    variant = open_variant(name, tiny_config())
    assert variant.refused == "cpu has no CUDA graphs"
    variant.warm_up()
    assert variant.refused == "cpu has no CUDA graphs"
    variant.close()


def test_a_name_nobody_has() -> None:
    for opened in (open_variant, variant_config):
        with pytest.raises(ConfigError, match=r"unknown variant 'capture'. Did you mean 'captured'\?"):
            opened("capture", tiny_config())  # pyright: ignore
    with pytest.raises(ConfigError, match="There are: baseline, baseline-amp, eager"):
        variant_config("x", tiny_config())


def test_what_each_is() -> None:
    config = tiny_config("bfloat16")
    told = {name: describe(name, config) for name in KNOWN}
    assert len(set(told.values())) == len(KNOWN)
    assert told["captured-compiled"] == (
        "ours, as one CUDA graph: bfloat16, channels-last, kernels: torch.compile's"
    )
    ways = {name: variant_config(name, config) for name in KNOWN}
    assert [ways[name].compile for name in KNOWN] == [False, False, False, True, False, True]
    assert [ways[name].capture for name in KNOWN] == ["off", "off", "off", "off", "on", "on"]
    assert [ways[name].kernels for name in KNOWN[:3]] == ["off", "off", "auto"]


def test_a_setting_that_a_variant_cannot_have_refuses_it_alone() -> None:
    """The baseline goes view by view; statistics over all views cannot."""
    config = tiny_config(bn_views="joint")
    baseline, ours = (open_variant(name, config) for name in ("baseline", "eager"))
    assert baseline.refused is not None
    assert "trunk_views" in baseline.refused
    assert ours.refused is None
    baseline.close()
    ours.close()


def test_a_network_that_cannot_be_compiled_is_refused() -> None:
    with fresh_cache(), inductor.patch({"cpp.cxx": ("/nonexistent/c++",)}):
        variant = open_variant("compiled", vanilla(tiny_config()))
        variant.warm_up()
    assert variant.refused is not None
    assert variant.refused.startswith("the network cannot be compiled (")
    assert "compiler" in variant.refused, "and the reason is told"
    assert "eager" not in variant.refused
    variant.close()


def test_training_that_breaks_is_refused() -> None:
    config = tiny.tiny_config()
    loader = tiny.Damaging(tiny.tiny_data(config).train, epoch_number=0, step=3, view=0)
    variant = open_variant("eager", config, loader)
    variant.warm_up(2)
    assert variant.refused is None
    variant.step()
    variant.check()
    assert variant.refused is not None
    assert variant.refused.startswith("step 3: not finite: ce/peer1")
    variant.close()


def test_data_that_are_wrong_are_an_error() -> None:
    config = tiny.tiny_config()
    loader = tiny.Damaging(tiny.tiny_data(config).train, epoch_number=0, step=1, view=0)
    variant = open_variant("eager", config, loader)
    with pytest.raises(DataError, match="not finite"):
        variant.warm_up()
    variant.close()


@pytest.mark.parametrize("name", ["baseline-amp", "eager"])
@pytest.mark.parametrize("dataset", ["cifar10", "imagenet"])
def test_noise_is_as_the_loaders_would_give_it(name: str, dataset: Any) -> None:
    config = tiny_config("bfloat16")
    data = dataclasses.replace(config.data, dataset=dataset, image_size=16, subset=9)
    own = variant_config(name, dataclasses.replace(config, data=data))
    loader = NoiseLoader(own)
    assert isinstance(loader, DeviceLoader)
    check_views(loader.take(), 3, config.data.classes if dataset == "cifar10" else 1000, torch.device("cpu"))
    views_VBCHW = loader.take().views_VBCHW
    assert views_VBCHW.shape == (3, 4, 3, 16, 16)
    assert views_VBCHW[0].is_contiguous(memory_format=torch.channels_last)
    assert views_VBCHW.dtype == (torch.bfloat16 if dataset == "imagenet" else torch.float32)
    assert views_VBCHW.float().std() == pytest.approx(1, abs=0.1)
    assert len(list(loader.epoch(0))) == loader.steps_per_epoch == 2
    assert all(batch is loader.batch for batch in itertools.islice(loader.epoch(1), 2))


def test_closing_frees_what_it_held() -> None:
    variant = open_variant("eager", tiny_config())
    variant.warm_up()
    held = weakref.ref(state_of(variant).network)
    variant.close()
    gc.collect()
    assert held() is None
    variant.close()


def test_the_last_step_of_the_warm_up_is_timed() -> None:
    variant = open_variant("eager", tiny_config())
    total = variant.warm_up(4)
    began = time.perf_counter()
    variant.step()
    again = time.perf_counter() - began
    assert 0 < variant.step_seconds < total
    assert again / 20 < variant.step_seconds < 20 * again
    variant.close()
