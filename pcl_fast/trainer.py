"""The training loop: resume, train, evaluate, record, save; everything a step must not do."""

import contextlib
import time
from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch

from pcl_fast.build import build_state
from pcl_fast.checkpoint import save_model
from pcl_fast.config import Config
from pcl_fast.contract import OpenData, ViewBatch
from pcl_fast.errors import DivergedError, PclError, Preempted
from pcl_fast.evaluate import evaluate_state
from pcl_fast.first_batch import check_views
from pcl_fast.lockstep import run_together, to_all
from pcl_fast.metrics import RunningMeans
from pcl_fast.run_folder import RunFolder
from pcl_fast.signals import StopSignal
from pcl_fast.sinks import Record, RunInfo, Sink
from pcl_fast.step.capture import make_calls
from pcl_fast.step.device_step import DeviceStep
from pcl_fast.step.feed import make_feed
from pcl_fast.step.timetable import Timetable

Accuracies = dict[str, dict[str, float]]


class Trainer:
    """One run, from its resolved configuration and its open data to its last checkpoint."""

    def __init__(self, config: Config, data: OpenData, folder: RunFolder, sinks: Sequence[Sink]) -> None:
        self.config, self.data, self.folder, self.sinks = config, data, folder, sinks
        self.device = torch.device(config.device)
        self.state = build_state(config, say=self.say)
        self.objective = self.state.objective
        self.train_heads = [f"peer{j + 1}" for j in range(self.objective.num_peers)]
        self.train_heads += ["ensemble"] * self.objective.has_ensemble
        width = len(self.objective.term_names) + len(self.train_heads) + 1
        self.recent = RunningMeans(width, self.device)
        self.epoch_means = RunningMeans(width, self.device)
        self.timetable = Timetable(config, data.train.steps_per_epoch, self.device)
        self.feed = make_feed(data.train, self._check, fixed=config.capture == "on")
        means = self.recent, self.epoch_means
        self.device_step = DeviceStep(self.state, self.feed, self.timetable, means)
        self.steps_done = self.epochs_closed = self.records = 0
        self.accuracies: Accuracies = {}
        self.stop = StopSignal()
        self._saved = time.monotonic()

    def run(self) -> Accuracies:
        """Train to the last epoch, and return what every head reached after it, by its name.

        Raises Preempted after a signal, with everything saved; DivergedError if something is not
        finite, with the last good checkpoint kept; DataError if the first batch of an epoch is not as agreed;
        PclError if the disk refuses a save that must be.
        """
        train_together([self])
        return self.accuracies

    def steps(self) -> Generator[int]:
        """The host's side of the run: yields where `device_step` is due, with the size of its batch.

        Raises what `run` raises.
        """
        self._resume()
        info = RunInfo(
            title=f"{self.config.method} seed {self.config.seed}",
            run_dir=self.folder.path,
            epochs=self.config.train.epochs,
            steps_per_epoch=self.data.train.steps_per_epoch,
            first_step=self.steps_done,
            first_record=self.records,
            headline=self.objective.headline,
        )
        for sink in self.sinks:
            sink.started(info)
        try:
            while self.epochs_closed < self.config.train.epochs:
                yield from self._train_epoch(self.epochs_closed)
                self._close_epoch(self.epochs_closed)
            self._serve_stop()  # a signal during the last save is not lost on the next run
        except DivergedError as error:
            raise DivergedError(f"{error}. {self._last_checkpoint()}") from None
        finally:
            self.feed.close()
            self._tell(lambda sink: sink.closed())

    def _train_epoch(self, epoch: int) -> Generator[int]:
        """Train what is left of an epoch; a signal is served after each step."""
        self.state.learning_mode()
        self.recent.restart_clock()
        self.epoch_means.restart_clock()
        steps_per_epoch = self.data.train.steps_per_epoch
        first = self.steps_done - epoch * steps_per_epoch
        if first < steps_per_epoch:
            self.feed.begin(epoch, first)
            while (samples := self.feed.advance()) is not None:
                yield samples
                self._account(samples, epoch)
                for sink in self.sinks:
                    sink.stepped(self.steps_done)
                self._serve_stop()
            self.feed.close()
        self.state.guard.check()

    def _check(self, batch: ViewBatch) -> None:
        check_views(batch, self.objective.num_views, self.state.network.num_classes, self.device)

    def _account(self, samples: int, epoch: int) -> None:
        """Count a step; check it and write it down where that is due."""
        step = self.steps_done + 1
        due = step % self.config.train.log_every == 0
        if due or self.device.type == "cpu":  # on a GPU looking means waiting
            self.state.guard.check()
        self.steps_done = step
        for running in (self.recent, self.epoch_means):
            running.count(samples)
        if due:
            self._write({"kind": "step"} | self._describe(self.recent, epoch))
            self.recent.reset()

    def _close_epoch(self, epoch: int) -> None:
        """Evaluate, record and save, as often as the configuration says and after the last epoch."""
        last = epoch + 1 == self.config.train.epochs
        rate = self.epoch_means.rate()
        measured: Record = {}
        if last or (epoch + 1) % self.config.train.eval_every == 0:
            heads = evaluate_state(self.state, self.data.val, self._serve_stop)
            self.accuracies = {head: accuracy.as_dict() for head, accuracy in heads.items()}
            measured = {"val": self.accuracies}
        record = {"kind": "epoch"} | self._describe(self.epoch_means, epoch) | measured
        self._write(record | {"images_per_second": rate})
        self.epoch_means.reset()
        self.epochs_closed += 1
        if last or self._save_is_due(epoch):
            try:
                self._save()
            except OSError as error:
                if last:
                    raise self._unsaved(error) from None
                self.say(f"could not save a checkpoint ({error}); training goes on, the previous one stays")

    def _save_is_due(self, epoch: int) -> bool:
        train = self.config.train
        return (epoch + 1) % train.save_every == 0 and time.monotonic() - self._saved >= train.save_seconds

    def _describe(self, running: RunningMeans, epoch: int) -> Record:
        moment = self.timetable.on_host(self.steps_done)
        names = self.objective.term_names
        means = running.means()
        correct = means[len(names) + 1 :]
        return {
            "epoch": epoch,
            "step": moment.step,
            "lr": moment.lr,
            "distill_weight": moment.distill_weight,
            "ema_coefficient": moment.ema_coefficient,
            "loss": sum(means[: len(names)]),
            "terms": dict(zip(names, means, strict=False)),
            "gradient_norm": means[len(names)],
            "train_top1": {head: 100 * share for head, share in zip(self.train_heads, correct, strict=True)},
            "images_per_second": running.rate(),
        }

    def _write(self, record: Record) -> None:
        self.records += 1
        self._tell(lambda sink: sink.recorded(record))

    def _tell(self, report: Callable[[Sink], None]) -> None:
        """Report to every sink; one that cannot write does not end the run."""
        for sink in self.sinks:
            try:
                report(sink)
            except OSError as error:
                self.say(f"{type(sink).__name__} could not write ({error}); training goes on")

    def say(self, message: str) -> None:
        """Tell every sink something that a person should read."""
        for sink in self.sinks:
            with contextlib.suppress(OSError):
                sink.said(message)

    def _serve_stop(self) -> None:
        """Save and raise Preempted, if a signal has come."""
        if self.stop.received is None:
            return
        self.state.guard.check()
        try:
            self._save()
        except OSError as error:
            raise self._unsaved(error) from None
        raise Preempted(f"stopped by {self.stop.received} after step {self.steps_done}; everything is saved")

    def _save(self) -> None:
        """A checkpoint, and the deployable network of this moment."""
        progress = {
            "steps_done": self.steps_done,
            "epochs_closed": self.epochs_closed,
            "records": self.records,
            "accuracies": self.accuracies,
            "recent": self.recent.state_dict(),
            "epoch_means": self.epoch_means.state_dict(),
        }
        content = {"progress": progress, "state": self.state.state_dict()}
        self.folder.checkpoints.save(content, self.steps_done)
        self._saved = time.monotonic()
        about = {
            "model": self.config.model,
            "method": self.config.method,
            "dataset": self.config.data.dataset,
            "steps": str(self.steps_done),
        }
        save_model(self.folder.model, self.state.deployed_tensors(), about)

    def _resume(self) -> None:
        """Go on from the newest whole checkpoint, if there is one."""
        saved = self.folder.checkpoints.load_newest(self.say)
        if saved is None:
            return
        self.state.load_state_dict(saved["state"])
        progress: dict[str, Any] = saved["progress"]
        self.steps_done, self.epochs_closed = progress["steps_done"], progress["epochs_closed"]
        self.records, self.accuracies = progress["records"], progress["accuracies"]
        self.device_step.go_on_after(self.steps_done)
        self.recent.load_state_dict(progress["recent"])
        self.epoch_means.load_state_dict(progress["epoch_means"])

    def _unsaved(self, error: OSError) -> PclError:
        return PclError(
            f"{self.folder.path}: could not save after step {self.steps_done} ({error}). "
            f"{self._last_checkpoint()}; make room, and the same command goes on from there"
        )

    def _last_checkpoint(self) -> str:
        paths = self.folder.checkpoints.paths()
        return f"The last checkpoint is {paths[-1]}" if paths else "There is no checkpoint yet"


def train_together(trainers: Sequence[Trainer]) -> None:
    """Train several runs on one device, a step of each side by side; they differ in nothing but their seed.

    Each ends as it would alone, to the bit where kernels are deterministic, but for networks with dropout:
    torch's random generator is one for all.
    A run that fails ends alone. Raises what `Trainer.run` raises, when all have ended.
    """
    first = trainers[0]
    calls = make_calls(first.config.capture, first.device, to_all(trainers), first.config.compile)
    run_together(trainers, calls)
