"""The training loop: resume, train, evaluate, record, save; everything a step must not do."""

from collections.abc import Callable, Generator, Sequence

import torch

from pcl_fast.build import build_state
from pcl_fast.config import Config
from pcl_fast.contract import OpenData, ViewBatch
from pcl_fast.dist import ALONE, Result, World
from pcl_fast.errors import DivergedError, Preempted
from pcl_fast.evaluate import tally_state
from pcl_fast.first_batch import check_views
from pcl_fast.held_out import learn, observe
from pcl_fast.keeper import Keeper
from pcl_fast.lockstep import run_together, to_all
from pcl_fast.metrics import RunningMeans
from pcl_fast.out_of_memory import advising
from pcl_fast.progress import Accuracies, Progress
from pcl_fast.records import describe, num_measured
from pcl_fast.reporter import Reporter
from pcl_fast.run_folder import RunFolder
from pcl_fast.signals import StopSignal
from pcl_fast.sinks import Record, RunInfo, Sink
from pcl_fast.step.capture import make_calls
from pcl_fast.step.device_step import DeviceStep
from pcl_fast.step.feed import BatchShape, make_feed
from pcl_fast.step.timetable import Timetable

STOP_EVERY = 8  # steps on a GPU between two times that ranks agree whether to stop; the host runs ahead


class Trainer:
    """One run, from its resolved configuration and its open data to its last checkpoint, on one rank."""

    def __init__(
        self,
        config: Config,
        data: OpenData,
        folder: RunFolder,
        sinks: Sequence[Sink],
        world: World = ALONE,
    ) -> None:
        self.config, self.data, self.folder, self.world = config, data, folder, world
        self.device = torch.device(config.device)
        self.reporter = Reporter(sinks)
        self.keeper = Keeper(config, folder, world, self.say)
        self.state = build_state(config, say=self.say, world=world, first=self.keeper.first_weights())
        self.objective = self.state.objective
        width = num_measured(self.objective)
        means = RunningMeans(width, self.device, world), RunningMeans(width, self.device, world)
        self.progress = Progress(*means)
        self.timetable = Timetable(config, data.train.steps_per_epoch, self.device)
        self.feed = make_feed(data.train, self._check, fixed=config.capture == "on")
        self.device_step = DeviceStep(self.state, self.feed, self.timetable, means)
        self.stop = StopSignal()

    @property
    def steps_done(self) -> int:
        """Steps of the whole run that are done."""
        return self.progress.steps_done

    @property
    def accuracies(self) -> Accuracies:
        """The newest accuracies of every head, by its name."""
        return self.progress.accuracies

    def run(self) -> Accuracies:
        """Train to the last epoch, and return what every head reached after it, by its name.

        Raises Preempted after a signal to any rank, with everything saved; DivergedError if something is not
        finite on any, with the last good checkpoint kept; DataError if the first batch of an epoch is not as
        agreed; PclError if the disk refuses a save that must be.
        """
        train_together([self])
        return self.accuracies

    def steps(self) -> Generator[BatchShape]:
        """The host's side of the run: yields where `device_step` is due, with the shape of its batch.

        Raises what `run` raises.
        """
        self.world.pass_on(self.stop)
        if self.keeper.restore(self.progress, self.state):
            self.device_step.go_on_after(self.steps_done)
        self.reporter.started(self._info())
        try:
            self._serve_stop()  # one that came while data was opened
            while self.progress.epochs_closed < self.config.train.epochs:
                yield from self._train_epoch(self.progress.epochs_closed)
                self._close_epoch(self.progress.epochs_closed)
            self._serve_stop()  # a signal during the last save is not lost on the next run
        except DivergedError as error:
            self._close(error)  # after which a save that was under way counts
            known = DivergedError(f"{error}. {self.keeper.newest()}")
            known.told_elsewhere = not self.world.is_first
            raise known from None
        except BaseException as error:
            self._close(error.__context__ or error if isinstance(error, GeneratorExit) else error)
            raise
        self._close()

    def _close(self, error: BaseException | None = None) -> None:
        self.feed.close()
        self.keeper.close(self.steps_done, error)
        self.reporter.closed()

    def _info(self) -> RunInfo:
        return RunInfo(
            title=f"{self.config.method} seed {self.config.seed}",
            run_dir=self.folder.path,
            epochs=self.config.train.epochs,
            steps_per_epoch=self.data.train.steps_per_epoch,
            first_step=self.progress.steps_done,
            first_record=self.progress.records,
            headline=self.objective.headline,
        )

    def _train_epoch(self, epoch: int) -> Generator[BatchShape]:
        """Train what is left of an epoch; a signal is served after each step, or each few on a GPU."""
        self.state.learning_mode()
        self.progress.recent.restart_clock()
        self.progress.epoch_means.restart_clock()
        steps_per_epoch = self.data.train.steps_per_epoch
        first = self.steps_done - epoch * steps_per_epoch
        if first < steps_per_epoch:
            self.world.enter("opening the epoch's data", self.steps_done + 1)
            self.feed.begin(epoch, first)
            while (shape := self._next_batch()) is not None:
                yield shape
                self._account(shape.images, epoch)
                self.reporter.stepped(self.steps_done)
                if self._may_stop_here():
                    self._serve_stop()
            self.feed.close()
        self.state.guard.check()

    def _may_stop_here(self) -> bool:
        """Whether this is a step after which all ranks look for a signal."""
        wait_for_others = self.device.type == "cuda" and self.world.is_joined
        return not wait_for_others or self.steps_done % STOP_EVERY == 0

    def _next_batch(self) -> BatchShape | None:
        self.world.enter("waiting for data", self.steps_done + 1)
        shape = self.feed.advance()
        self.world.enter("training", self.steps_done + 1)
        return shape

    def _check(self, batch: ViewBatch) -> None:
        check_views(batch, self.objective.num_views, self.state.network.num_classes, self.device)

    def _account(self, images: int, epoch: int) -> None:
        """Count a step; check it, write it down and save where that is due."""
        step, train = self.steps_done + 1, self.config.train
        due = step % train.log_every == 0
        if due or self.device.type == "cpu":  # on a GPU looking means waiting
            self.state.guard.check()
        self.progress.steps_done = step
        for running in (self.progress.recent, self.progress.epoch_means):
            running.count(images)
        if due:
            self._write({"kind": "step"} | self._describe(self.progress.recent, epoch))
            self.progress.recent.reset()
        self.keeper.tell()
        if train.save_steps and step % train.save_steps == 0:
            self.state.guard.check()
            self._save()

    def _save(self) -> None:
        self.world.enter("saving", self.steps_done)
        self.keeper.save(self.progress, self.state)

    def _close_epoch(self, epoch: int) -> None:
        """Evaluate, record and save, as often as the configuration says and after the last epoch."""
        last = epoch + 1 == self.config.train.epochs
        means = self.progress.epoch_means
        rate = means.rate()
        measured, leave = Record(), self._leave_evaluation
        if self.objective.wants_held_out:
            observed = self._on_all(lambda: observe(self.state, self.data.held_out, leave))
            measured["held_out"] = learn(self.objective, observed)
        if last or (epoch + 1) % self.config.train.eval_every == 0:
            tallies = self._on_all(lambda: tally_state(self.state, self.data.val, leave))
            measured |= self.progress.evaluated(tallies)
        record = {"kind": "epoch"} | self._describe(means, epoch) | measured
        self._write(record | {"images_per_second": rate})
        means.reset()
        self.progress.epochs_closed += 1
        if last or self.keeper.is_due(epoch):
            self._save()
        if last:
            self.keeper.finish()

    def _on_all(self, measure: Callable[[], Result]) -> list[Result]:
        """What all ranks measure; a signal to any is served instead, after the batch at hand."""
        try:
            mine = measure()
        except _Stopped:
            mine = None
        found = self.world.gather(mine)
        whole = [each for each in found if each is not None]
        if len(whole) < len(found):
            self._serve_stop()
        return whole

    def _leave_evaluation(self) -> None:
        self.world.enter("evaluation", self.steps_done)
        if self.stop.received is not None:
            raise _Stopped

    def _describe(self, running: RunningMeans, epoch: int) -> Record:
        return describe(running, self.timetable.on_host(self.steps_done), self.state, epoch)

    def _write(self, record: Record) -> None:
        self.progress.records += 1
        self.reporter.recorded(record)

    def say(self, message: str) -> None:
        """Tell every sink something that a person should read."""
        self.reporter.said(message)

    def _serve_stop(self) -> None:
        """Save and raise Preempted, if a signal has come to any rank."""
        if not self.world.any(self.stop.received is not None):
            return
        name = next(name for name in self.world.gather(self.stop.received) if name is not None)
        self.state.guard.check()
        self._save()
        self.keeper.finish()
        stop = Preempted(f"stopped by {name} after step {self.steps_done}; everything is saved", name)
        stop.told_elsewhere = not self.world.is_first
        raise stop


class _Stopped(Exception):
    """Leaves an evaluation."""


def train_together(trainers: Sequence[Trainer], stop: StopSignal | None = None) -> None:
    """Train several runs on one device, a step of each side by side; they differ in nothing but their seed.

    Each ends as it would alone, to the bit where kernels are deterministic, but for networks with dropout:
    torch's random generator is one for all.
    A run that fails ends alone. Raises what `Trainer.run` raises, when all have ended. A signal that `stop`
    has received before is served before the first step.
    """
    first = trainers[0]
    calls = make_calls(first.config.capture, first.device, to_all(trainers), first.config.compile)
    with advising(first.config, first.state.arena.buffers):
        run_together(trainers, calls, stop)
