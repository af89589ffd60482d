"""A command's words, read into a dataclass by tyro; what is wrong with them, in one line."""

import contextlib
import io
import os
import re
import sys
from collections.abc import Generator, Sequence
from typing import Any, TypeVar

from pcl_fast.errors import ConfigError

Arguments = TypeVar("Arguments")

WIDE = "100000"  # columns, so that nothing is wrapped
_OWN = re.compile(r"Error parsing [\w.-]+: (?=--)")  # what a dataclass said of its own flag


def read_flags(kind: type[Arguments], words: Sequence[str], prog: str, **options: Any) -> Arguments:
    """What `words` say, as a `kind`; `options` are tyro's. Prints help, and exits, where that is asked for.

    ConfigError for words that cannot be read, with the nearest right flag.
    """
    import tyro  # late: `profile gpu` also runs where it is missing

    with one_line(words, prog):
        return tyro.cli(kind, args=words, prog=prog, **options)


@contextlib.contextmanager
def one_line(words: Sequence[str], prog: str) -> Generator[None]:
    """Makes a ConfigError of what tyro finds wrong with `words`; help it prints as ever."""
    if {"-h", "--help"} & set(words):
        yield
        return
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), _wide():
            yield
    except SystemExit:
        raise ConfigError(in_a_line(said.getvalue(), prog)) from None
    sys.stderr.write(said.getvalue())


def in_a_line(box: str, prog: str) -> str:
    """What tyro says in a box, whose parts are ruled off: a title, the message, perhaps proposals."""
    parts: list[list[str]] = [[]]
    for line in box.splitlines():
        inner = line.strip(" │")
        if inner.startswith("╭") or (inner and not inner.strip("─-╰╯")):
            parts.append([])
        elif inner:
            parts[-1].append(inner)
    first, *others = [" ".join(part) for part in parts[1:] if part] or [" ".join(box.split())]
    message, of_own = _OWN.subn("", first)
    if of_own:
        return message
    meant = [re.search(r"--[\w.-]+", other) for other in others if other.startswith("Perhaps you meant")]
    hint = f" Did you mean '{meant[0][0]}'?" if meant and meant[0] else ""
    message = message.removeprefix("Error parsing ").removesuffix(".")
    return f"{message[0].lower()}{message[1:]}.{hint} `{prog} --help` lists all flags"


@contextlib.contextmanager
def _wide() -> Generator[None]:
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = WIDE
    try:
        yield
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before
