"""The errors a user can meet, each with the exit code of the command line.

Every message is one line that says what is wrong, which value, where, and how to fix it.
"""

import difflib
from collections.abc import Iterable


class PclError(Exception):
    """Base of all errors meant for a user; `exit_code` is what the command line ends with.

    `told_elsewhere`: another rank tells the user of it.
    """

    exit_code = 1
    told_elsewhere = False


class ConfigError(PclError, ValueError):
    """A setting, a flag, a preset or a run folder that cannot be used."""

    exit_code = 2


class FolderInUse(ConfigError):
    """A run folder that another process trains in."""


class DataError(PclError):
    """A data set that is missing, damaged or not what it claims to be."""

    exit_code = 3


class DivergedError(PclError):
    """A loss that stopped being finite; the weights are those of the last finite step."""

    exit_code = 4


class Preempted(PclError):
    """Training was asked to stop by `signal`, and has saved everything it needs to go on."""

    exit_code = 75

    def __init__(self, message: str, signal: str | None = None) -> None:
        super().__init__(message, signal)
        self.signal = signal

    def __str__(self) -> str:
        return str(self.args[0])


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """` Did you mean 'x'?` for the nearest known word, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else ""
