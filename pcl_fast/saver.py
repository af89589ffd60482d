"""Checkpoints written in the background, while training goes on."""

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pcl_fast.checkpoint import CheckpointStore, save_model


class Saver:
    """Writes the checkpoints of a run and, with each, its deployable network: one save at a time.

    The network is written first, so that a checkpoint is never without it: whoever is killed between the two
    goes on from the checkpoint before, and comes here again.
    A normal exit of the interpreter waits for a save under way; a kill leaves complete files, or none.
    Every method raises an exception of the thread that is no OSError: that is a defect, and not of the disk.
    """

    def __init__(self, checkpoints: CheckpointStore, model: Path) -> None:
        self.checkpoints, self.model = checkpoints, model
        self._thread: threading.Thread | None = None
        self._raised: BaseException | None = None  # by the save under way; the thread sets it
        self._last: BaseException | None = None  # what the last save failed with
        self._untold: OSError | None = None

    def save(
        self, content: dict[str, Any], step: int, deployed: Mapping[str, Tensor], about: Mapping[str, str]
    ) -> None:
        """Copy everything, and have it written; waits for the save before, if it is still under way.

        `content`: dictionaries, lists and tuples of tensors on any device and of plain values, with the keys
        of a checkpoint. `deployed` and `about`: the tensors and the description of model.safetensors.
        Nothing of it is looked at after the return: all may change in place. On a GPU the copies are made in
        the order of the current stream, and waited for.
        """
        self._finish()
        copies = _copied(content), step, _copied(deployed), dict(about)
        self._thread = threading.Thread(target=self._write, args=copies, name="saver")
        self._thread.start()

    def failure(self) -> OSError | None:
        """What the newest finished save failed with, told once; never waits."""
        if self._thread is not None and not self._thread.is_alive():
            self._finish()
        told, self._untold = self._untold, None
        return told

    def wait(self) -> None:
        """Return when the last save is on the disk. OSError if it failed, though that was told."""
        self._finish()
        if self._last is not None:
            self._untold = None
            raise self._last

    def close(self) -> OSError | None:
        """Wait, and return what `failure` would: nothing is raised over an exception that ends a run."""
        self._finish()
        return self.failure()

    def _write(
        self, content: dict[str, Any], step: int, deployed: dict[str, Tensor], about: dict[str, str]
    ) -> None:
        try:
            save_model(self.model, deployed, about)
            self.checkpoints.save(content, step)
        except BaseException as error:  # raised where somebody is
            self._raised = error

    def _finish(self) -> None:
        """Wait for the thread, and take over how it ended."""
        if self._thread is None:
            return
        self._thread.join()
        raised, self._thread, self._raised = self._raised, None, None
        self._last = raised
        if raised is not None and not isinstance(raised, OSError):
            raise raised
        self._untold = raised or self._untold  # an older one stays until it was told


def _copied(value: Any) -> Any:
    """The same with every tensor in memory of its own on the CPU, and containers of their own."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: _copied(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_copied(inner) for inner in value]
    if isinstance(value, tuple):
        return tuple(_copied(inner) for inner in value)
    return value
