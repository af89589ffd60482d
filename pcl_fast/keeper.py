"""Keeps a run: saves it while training goes on, and finds what was saved."""

import time
from collections.abc import Callable

from pcl_fast.config import Config
from pcl_fast.dist import World
from pcl_fast.errors import PclError, Preempted
from pcl_fast.first_weights import read_first_weights
from pcl_fast.progress import Progress
from pcl_fast.run_folder import RunFolder
from pcl_fast.run_log import RunLog
from pcl_fast.run_network import RunNetwork
from pcl_fast.saver import Saver
from pcl_fast.step.state import TrainState


class Keeper:
    """Saves to and restores from a run's folder, which the first rank reads and writes for all.

    A disk that refuses a save does not end the run, unless it is one to wait for; `say` is told. When and
    where each process began, and how it ended, is noted in the folder.
    """

    def __init__(self, config: Config, folder: RunFolder, world: World, say: Callable[[str], None]) -> None:
        self._config, self._folder, self._world, self._say = config, folder, world, say
        self._saver = Saver(folder.checkpoints, folder.model)
        self._saved, self._step = time.monotonic(), 0
        self._log = RunLog(folder.path, say) if world.is_first else None
        self._facts: dict[str, str] = {}

    def first_weights(self) -> RunNetwork | None:
        """The network that the run begins with; None if it has none, or goes on from a checkpoint.

        Its SHA-256 is noted with the start (`init`). Raises what `read_first_weights` raises.
        """
        config, goes_on = self._config, self._folder.goes_on
        first = self._world.on_first(lambda: None if goes_on(config) else read_first_weights(config))
        self._facts = {"init": first.sha256} if first else {}
        return first

    def restore(self, progress: Progress, state: TrainState) -> bool:
        """Go on from the newest whole checkpoint; False if there is none.

        ConfigError if there is one that cannot be gone on from, or if ranks differ in what they begin with.
        """
        checkpoints = self._folder.checkpoints
        saved = self._world.on_first(lambda: checkpoints.load_newest(self._say, set_aside=True))
        if saved is not None:
            progress.restore(saved, state, self._world)
        self._world.agree("state (are versions and settings the same?)", state.checksum())
        self._note_start(progress.steps_done)
        return saved is not None

    def _note_start(self, step: int) -> None:
        if self._log is None:
            return
        before = self._log.previous()
        if before is not None:
            self._say(before)
        self._log.started(step=step, ranks=self._world.size, device=self._config.device, **self._facts)

    def is_due(self, epoch: int) -> bool:
        """Whether to save after an epoch (0-based); the same on all ranks."""
        train = self._config.train
        if (epoch + 1) % train.save_every:
            return False
        return self._world.share(time.monotonic() - self._saved >= train.save_seconds)

    def save(self, progress: Progress, state: TrainState) -> None:
        """Begin to write a checkpoint, and the deployable network of this moment; all ranks call it."""
        content = progress.checkpoint(state, self._world)
        self._saved, self._step = time.monotonic(), progress.steps_done
        if content is None:
            return
        about = {
            "model": state.network.backbones[state.objective.deployment.peer].name,
            "method": self._config.method,
            "dataset": self._config.data.dataset,
            "steps": str(progress.steps_done),
        }
        self._saver.save(content, progress.steps_done, state.deployed_tensors(), about)

    def tell(self) -> None:
        """Say if the newest save has failed."""
        failure = self._saver.failure()
        if failure is not None:
            self._say(f"could not save a checkpoint ({failure}); training goes on, the previous one stays")

    def finish(self) -> None:
        """Wait until the newest save is on the disk; PclError on all ranks if it cannot be."""
        self._world.on_first(self._wait)

    def _wait(self) -> None:
        try:
            self._saver.wait()
        except OSError as error:
            raise PclError(
                f"{self._folder.path}: could not save after step {self._step} ({error}). "
                f"{self.newest()}; make room, and the same command goes on from there"
            ) from None

    def newest(self) -> str:
        """Which checkpoint there is, in words."""
        paths = self._folder.checkpoints.paths()
        return f"The last checkpoint is {paths[-1]}" if paths else "There is no checkpoint yet"

    def close(self, step: int, error: BaseException | None = None) -> None:
        """Let a save that is under way end, and note how the run has ended after `step`."""
        failure = self._saver.close()
        if failure is not None and error is None:
            self._say(f"could not save a checkpoint ({failure}); the previous one stays")
        if self._log is None:
            return
        if error is None:
            self._log.ended("finished", step)
        elif isinstance(error, Preempted):
            self._log.ended("stopped", step, error.signal)
        else:
            self._log.ended("failed", step, f"{type(error).__name__}: {error}")
