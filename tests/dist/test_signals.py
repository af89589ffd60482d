"""A signal to one of two ranks: both stop at the same step, save, and go on as if nothing had been."""

import re
import shlex
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from pcl_fast.run_log import read_entries
from tests.dist.ranks import Outcome
from tests.dist.training import (
    EVALUATION,
    LOADER,
    OPENING,
    RESTORING,
    SAVING,
    STEP,
    STEPS,
    STEPS_PER_EPOCH,
    Fault,
    codes,
    get_signal,
    run,
    said,
    sleep,
    training,
)
from tests.tiny import assert_same_run, newest_checkpoint

TERM, USR1, INT, KILL = signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGKILL
SECOND_EPOCH = STEPS_PER_EPOCH + 2  # the first batch of the second epoch: the end of the first was asked for


def stopped(outcomes: list[Outcome], path: Path, step: int, number: signal.Signals) -> list[str]:
    """Check that all ranks have stopped after a step; returns the words of the command that goes on."""
    assert codes(outcomes) == [75, 75], said(outcomes)
    first, go_on = outcomes[0].err.splitlines()
    told = f"stopped by {number.name} after step {step}; everything is saved"
    assert first == f"pcl-fast: rank 0: {told}"
    assert outcomes[1].err == "", "told once"
    assert newest_checkpoint(path)["progress"]["steps_done"] == step
    last = read_entries(path / "starts.jsonl")[-1]
    assert (last["event"], last["how"], last["step"], last["message"]) == (
        "ended",
        "stopped",
        step,
        number.name,
    )
    torchrun, *words = shlex.split(go_on.removeprefix("to go on:  "))
    assert [torchrun, *words[:5]] == [*shlex.split("torchrun --standalone --nproc-per-node 2 -m pcl_fast")]
    return words[5:]


def finished(outcomes: list[Outcome], path: Path, straight: Path) -> None:
    """Check that the run has ended as the undisturbed one did."""
    assert codes(outcomes) == [0, 0], said(outcomes)
    assert_same_run(path, straight)


PLACES = [
    pytest.param(Fault(1, OPENING, partial(get_signal, TERM)), 0, id="while data is opened"),
    pytest.param(Fault(1, RESTORING, partial(get_signal, USR1)), 0, id="before the first step"),
    pytest.param(Fault(1, LOADER, partial(get_signal, INT), 2), 2, id="in the loader"),
    pytest.param(Fault(1, STEP, partial(get_signal, TERM), 3), 3, id="in the last step of an epoch"),
    pytest.param(Fault(1, LOADER, partial(get_signal, USR1), SECOND_EPOCH), 4, id="in the next epoch"),
    pytest.param(Fault(1, SAVING, partial(get_signal, TERM), 2), STEPS, id="in the last save"),
]


@pytest.mark.parametrize(("fault", "step"), PLACES)
def test_all_stop_at_the_same_step_and_going_on_changes_nothing(
    photos: Path, straight: Path, tmp_path: Path, fault: Fault, step: int
) -> None:
    path, number = tmp_path / "run", fault.deed.args[0]  # type: ignore[attr-defined]
    words = stopped(run(tmp_path, training(photos, path), fault), path, step, number)
    finished(run(tmp_path, words), path, straight)


def test_an_evaluation_is_left_within_a_batch(photos: Path, straight: Path, tmp_path: Path) -> None:
    """The second rank gets the signal before its first image; the first, at work on its own, hears of it."""
    path = tmp_path / "run"
    heard = [Fault(0, EVALUATION, partial(sleep, 3), 2), Fault(0, EVALUATION, partial(get_signal, KILL), 3)]
    fault = Fault(1, EVALUATION, partial(get_signal, TERM), 1)
    words = stopped(run(tmp_path, training(photos, path), *heard, fault), path, STEPS_PER_EPOCH, TERM)
    assert newest_checkpoint(path)["progress"]["epochs_closed"] == 0
    finished(run(tmp_path, words), path, straight)


def compile_slowly(deed: Callable[[], None], function: Callable[..., Any]) -> Callable[..., Any]:
    """As torch.compile, whose first call is long at work, but for what it makes."""
    deeds = [deed]

    def compiled(*args: Any, **options: Any) -> Any:
        while deeds:
            time.sleep(0.5)
            deeds.pop()()
            time.sleep(0.5)
        return function(*args, **options)

    return compiled


def replace_compiler(deed: Callable[[], None]) -> None:
    """Compiling takes most of a minute here; of interest is only when a signal comes."""
    torch.compile = partial(compile_slowly, deed)  # type: ignore[assignment]


def test_what_comes_within_a_compilation_is_served_after_it(photos: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    slow = Fault(0, OPENING, partial(replace_compiler, partial(sleep, 0)))
    fault = Fault(1, OPENING, partial(replace_compiler, partial(get_signal, USR1)))
    stopped(run(tmp_path, training(photos, path, "--compile"), slow, fault), path, 1, USR1)


def test_two_signals_of_a_scheduler_are_one_stop(photos: Path, straight: Path, tmp_path: Path) -> None:
    """SIGUSR1 as a warning, then SIGTERM; and the other rank gets one, too."""
    path = tmp_path / "run"
    faults = [
        Fault(1, LOADER, partial(get_signal, USR1, TERM, TERM), 2),
        Fault(0, LOADER, partial(get_signal, USR1), 2),
        Fault(1, SAVING, partial(get_signal, TERM), 1),
    ]
    words = stopped(run(tmp_path, training(photos, path), *faults), path, 2, USR1)
    finished(run(tmp_path, words), path, straight)


def test_a_second_ctrl_c_does_not_wait(photos: Path, straight: Path, tmp_path: Path) -> None:
    """Both ranks end, and what was saved before is whole."""
    path = tmp_path / "run"
    words = training(photos, path, "--train.save-steps", "1")
    outcomes = run(tmp_path, words, Fault(1, LOADER, partial(get_signal, INT, INT), 2))
    assert codes(outcomes) == [1, 130], said(outcomes)
    assert outcomes[1].err == "pcl-fast: rank 1: interrupted; what was not saved before is lost\n"
    lost = r"pcl-fast: rank 0: error: lost another rank in step 2 \(training\): rank 1: KeyboardInterrupt.*\n"
    assert re.fullmatch(lost, outcomes[0].err)
    assert newest_checkpoint(path)["progress"]["steps_done"] == 1
    finished(run(tmp_path, words), path, straight)


def test_a_signal_while_the_other_rank_is_still_opening_its_data(
    photos: Path, straight: Path, tmp_path: Path
) -> None:
    path = tmp_path / "run"
    faults = Fault(0, OPENING, partial(sleep, 2)), Fault(1, OPENING, partial(get_signal, TERM))
    words = stopped(run(tmp_path, training(photos, path), *faults), path, 0, TERM)
    finished(run(tmp_path, words), path, straight)
