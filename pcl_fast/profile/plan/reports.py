"""Files of `pcl-fast profile ... --json` as a user gives them; what they are not is said in a line."""

import json
from pathlib import Path
from typing import Any

from pcl_fast.errors import ConfigError


def read_report(path: Path, flag: str, command: str) -> dict[str, Any]:
    """The JSON object in a file; ConfigError, naming the `command` that makes them, if there is none."""
    try:
        report = json.loads(path.expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"{flag} {path} cannot be read: {error.strerror}; `{command}` makes such a file"
        ) from error
    except ValueError:
        raise not_such(path, flag, command) from None
    if not isinstance(report, dict):
        raise not_such(path, flag, command)
    return report


def not_such(path: Path, flag: str, command: str) -> ConfigError:
    """The error of a file that is something else."""
    return ConfigError(f"{flag} {path}: not such a file; `{command}` makes one")
