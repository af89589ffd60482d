"""A run's folder: what lies where, whether a run may go on in it, and that only one process does."""

import json
from dataclasses import replace
from pathlib import Path

from pcl_fast import atomic
from pcl_fast.checkpoint import CheckpointStore, RunLock
from pcl_fast.config import Config
from pcl_fast.config_file import differences, from_dict, to_dict
from pcl_fast.errors import ConfigError

# Settings that change where or how loudly a run works, but not what it computes.
FREE_SETTINGS = frozenset(
    {
        "run_dir",
        "resume",
        "device",
        "capture",
        "data.root",
        "data.train",
        "data.val",
        "data.workers",
        "train.log_every",
        "dist.timeout",
        "train.save_every",
        "train.save_steps",
        "train.save_seconds",
        "train.eval_batch_size",
    }
)


def _as_begun(before: Config, config: Config) -> Config:
    """The configuration with the ranks that the run began with, if its global batch is the same."""
    if before.global_batch != config.global_batch:
        return config
    train = replace(config.train, batch_size=before.train.batch_size)
    return replace(config, ranks=before.ranks, train=train)


class RunFolder:
    """The files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.json"
        self.metrics = path / "metrics.jsonl"
        self.curves = path / "curves.png"
        self.model = path / "model.safetensors"
        self.checkpoints = CheckpointStore(path)

    def fitting(self, config: Config) -> Config:
        """The configuration with the images a rank that the run in this folder needs, to go on with.

        A run keeps its global batch, so that steps, schedules and the order of samples stay what they are,
        whatever the number of ranks. ConfigError if they cannot share it evenly.
        """
        if not config.resume or not self.config.exists():
            return config
        before = self.read_config()
        if before.train.batch_size != config.train.batch_size or before.ranks == config.ranks:
            return config  # `claim` decides
        images, rest = divmod(before.global_batch, config.ranks or 1)
        if rest:
            raise ConfigError(
                f"{self.path}: its {before.global_batch} images a step cannot be shared evenly by "
                f"{config.ranks} ranks; go on with a number of ranks that divides them"
            )
        return replace(config, train=replace(config.train, batch_size=images))

    def goes_on(self, config: Config) -> bool:
        """Whether a run with this configuration would go on from a checkpoint here."""
        return config.resume and bool(self.checkpoints.paths())

    def claim(self, config: Config) -> RunLock:
        """Lock the folder for a run with this (resolved) configuration, and write config.json.

        With `config.resume`, a folder whose run differs in a setting that counts is refused with the
        differences; without, a folder that holds a run is moved aside (`NAME.1`, `NAME.2`, ...).
        """
        if not config.resume and self.config.exists():
            self._move_aside()
        lock = RunLock(self.path)
        try:
            if self.config.exists():
                config = _as_begun(self.read_config(), config)
                self._refuse_changes(config)
            atomic.remove_leftovers(self.path)
            atomic.remove_leftovers(self.checkpoints.folder)
            atomic.write_text(self.config, json.dumps(to_dict(config), indent=2) + "\n")
        except BaseException:
            lock.close()
            raise
        return lock

    def read_config(self) -> Config:
        """The configuration of the run in this folder; ConfigError if there is none."""
        if not self.config.is_file():
            raise ConfigError(f"{self.path}: no run here (config.json is missing); give the folder of a run")
        try:
            return from_dict(json.loads(self.config.read_text()), where=str(self.config))
        except (json.JSONDecodeError, TypeError) as error:
            raise ConfigError(
                f"{self.config}: cannot be read ({error}); is it a run of this version?"
            ) from None

    def _refuse_changes(self, config: Config) -> None:
        changed = differences(self.read_config(), config, FREE_SETTINGS)
        if changed:
            listed = "\n  ".join(changed)
            raise ConfigError(
                f"{self.path}: holds a run with other settings; undo these changes to resume it, "
                f"or give another --run-dir, or --no-resume to move it aside:\n  {listed}"
            )

    def _move_aside(self) -> None:
        RunLock(self.path).close()  # not while another process trains in it
        number = 1
        while (aside := self.path.with_name(f"{self.path.name}.{number}")).exists():
            number += 1
        self.path.rename(aside)


def runs_in(folder: Path) -> list[Path]:
    """The folder itself if it is a run, else the runs directly in it; without any, the folder itself."""
    if RunFolder(folder).config.is_file():
        return [folder]
    runs = sorted(path.parent for path in folder.glob("*/config.json"))
    return runs or [folder]
