"""The ways of making a training step that are measured against each other, opened by name.

`baseline` and `baseline-amp` are the straightforward implementation (`baseline.py`), the others are ours. All
train: on the batches of a loader, or on one batch of noise, through epoch after epoch.
"""

import dataclasses
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from pcl_fast.build import describe_kernels
from pcl_fast.config import Config
from pcl_fast.contract import TrainLoader
from pcl_fast.device import prepare_backend
from pcl_fast.errors import ConfigError, did_you_mean
from pcl_fast.profile.baseline import baseline_config
from pcl_fast.profile.noise import NoiseLoader
from pcl_fast.profile.runs import Run, baseline_run, loading_run, training_run
from pcl_fast.profile.timing import synchronize
from pcl_fast.step.capture import WARMUP, first_line

BASELINES = ("baseline", "baseline-amp")
OURS = ("eager", "compiled", "captured", "captured-compiled")
KNOWN = (*BASELINES, *OURS)
BROKEN = (ConfigError, RuntimeError, OSError)  # of a setting, memory, a compiler, a capture; not of data
LR = 1e-3  # with which noise, too, can be learned for ever; what a step takes does not depend on it

_OPEN_COMPILED: list[str] = []


def variant_config(name: str, config: Config) -> Config:
    """How the variant does what a resolved configuration wants: what its loader must be made for.

    Raises:
        ConfigError: for a name that no variant has.
    """
    if name not in KNOWN:
        hint = did_you_mean(name, KNOWN) or f" There are: {', '.join(KNOWN)}."
        raise ConfigError(f"unknown variant '{name}'.{hint}")
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, lr=LR))
    if name in BASELINES:
        return baseline_config(config, amp=name == "baseline-amp")
    capture = "on" if name.startswith("captured") else "off"
    return dataclasses.replace(config, capture=capture, compile=name.endswith("compiled"))


def describe(name: str, config: Config) -> str:
    """A variant in a line."""
    if name in BASELINES:
        return {
            "baseline": "eager float32, NCHW, view by view, averages tensor by tensor",
            "baseline-amp": "the same with autocast to bfloat16, channels-last",
        }[name]
    layout = "channels-last" if config.channels_last == "on" else "NCHW"
    kernels = describe_kernels(variant_config(name, config))
    graph = "as one CUDA graph" if name.startswith("captured") else "uncaptured"
    return f"ours, {graph}: {config.amp.dtype}, {layout}, kernels: {kernels}"


def open_variant(name: str, config: Config, loader: TrainLoader | None = None) -> "Variant":
    """A variant that trains on the batches of `loader`, or on one batch of noise.

    `config` is resolved; `loader` serves `variant_config(name, config)`, and whoever opened it closes it.
    What cannot be is told by `refused`, here or after the warm-up.

    Raises:
        ConfigError: for a name that no variant has.
    """
    own = variant_config(name, config)
    train = baseline_run if name in BASELINES else training_run
    return _opened(name, config, lambda: train(own, loader or NoiseLoader(own)))


def open_loading(name: str, config: Config, loader: TrainLoader) -> "Variant":
    """What `open_variant` does less the training: the batches are made, the same way, and dropped."""
    own = variant_config(name, config)
    return _opened(name, config, lambda: loading_run(own, loader))


@dataclass(slots=True)
class Variant:
    """A way of making a step, ready to be called; `refused` says why it cannot be, if it cannot.

    `config` is its own, `about` describes it; `step_seconds` is what a step took when it was warm, roughly.
    """

    name: str
    config: Config
    about: str
    refused: str | None = None
    step_seconds: float = 0.0
    _run: Run | None = None

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return torch.device(self.config.device)

    @property
    def said(self) -> list[str]:
        """What it told meanwhile, as how long a capture took."""
        return [] if self._run is None else self._run.said

    def step(self) -> None:
        """Make a step; on a GPU it may still run there."""
        assert self._run is not None, self.refused
        self._run()

    def warm_up(self, steps: int = 2) -> float:
        """Make steps until all is compiled, chosen and captured, at least `steps`; the seconds this took.

        Sets `refused` if it shows that the variant cannot be, or that training with it breaks. Raises
        DataError, PclError as the loader does.
        """
        began = time.perf_counter()
        if self.refused is None and self._run is not None:
            steps = max(steps, WARMUP + 2) if self.config.capture == "on" else steps
            try:
                for _ in range(steps):
                    self._step_alone()
                self.refused = self._run.find_fault()
            except BROKEN as error:
                self.refused = first_line(error)
        return time.perf_counter() - began

    def _step_alone(self) -> None:
        began = time.perf_counter()
        self.step()
        synchronize(self.device)
        self.step_seconds = time.perf_counter() - began

    def check(self) -> None:
        """Set `refused` if a step since was not the one meant; waits for the device."""
        if self.refused is None and self._run is not None:
            self.refused = self._run.find_fault()

    def close(self) -> None:
        """Free what it holds, on the device, too."""
        run, self._run = self._run, None
        if run is None:
            return
        run.close()
        del run
        gc.collect()
        if self.config.compile:
            _OPEN_COMPILED.remove(self.name)
            if not _OPEN_COMPILED:  # torch keeps what it has compiled of a few networks only
                torch.compiler.reset()
        if self.device.type == "cuda" and torch.cuda.is_available():
            torch.cuda.empty_cache()


def _opened(name: str, config: Config, make: Callable[[], Run]) -> Variant:
    own, about = variant_config(name, config), describe(name, config)
    if own.capture == "on" and torch.device(own.device).type != "cuda":
        return Variant(name, own, about, refused=f"{own.device} has no CUDA graphs")
    try:
        prepare_backend(own)
        run = make()
    except BROKEN as error:
        return Variant(name, own, about, refused=first_line(error))
    if own.compile:
        _OPEN_COMPILED.append(name)
    return Variant(name, own, about, _run=run)
