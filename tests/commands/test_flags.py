"""What tyro says of words that it cannot read, in a line; all else of it passes through."""

import sys
from dataclasses import dataclass

import pytest

from pcl_fast.commands.flags import in_a_line, read_flags
from pcl_fast.errors import ConfigError

BOX = """\
╭─ Unrecognized options ──────────────╮
│ Unrecognized options: --mixup, a    │
│ path                                │
│ ─────────────────────────────────── │
│ Perhaps you meant:                  │
│     --train.mixup FLOAT             │
│         Alpha of a Beta. Or --other │
│ ─────────────────────────────────── │
│ For full helptext, run p --help     │
╰─────────────────────────────────────╯
"""
PLAIN = """\
 Value error
 -----------------------------------------
  Error parsing pcl: --pcl.num-peers 9: give 1 to 8
  ----------------------------------------
  For full helptext, see p --help
"""


@dataclass(frozen=True)
class Words:
    """What to read."""

    number: int = 3
    """A number."""


@pytest.mark.parametrize(
    ("box", "line"),
    [
        (
            BOX,
            "unrecognized options: --mixup, a path. Did you mean '--train.mixup'? `p --help` lists all flags",
        ),
        (PLAIN, "--pcl.num-peers 9: give 1 to 8"),
        ("Something\n  else", "something else. `p --help` lists all flags"),
    ],
    ids=["drawn", "plain", "no box"],
)
def test_the_message_and_the_nearest_flag_are_picked_out(box: str, line: str) -> None:
    assert in_a_line(box, "p") == line


def test_words_are_read_and_what_is_said_meanwhile_is_passed_on(capsys: pytest.CaptureFixture[str]) -> None:
    @dataclass(frozen=True)
    class Noisy(Words):
        def __post_init__(self) -> None:
            sys.stderr.write("a warning\n")

    assert read_flags(Noisy, ["--number", "4"], "p").number == 4
    assert "a warning\n" in capsys.readouterr().err


def test_help_is_printed_as_ever(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        read_flags(Words, ["--help"], "p")
    assert ended.value.code in (0, None)
    assert "--number INT" in capsys.readouterr().out


def test_what_cannot_be_read_is_an_error_of_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=r"^--number: .*'many'.* `p --help` lists all flags$"):
        read_flags(Words, ["--number", "many"], "p")
    assert capsys.readouterr() == ("", "")
