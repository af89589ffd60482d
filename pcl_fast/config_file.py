"""A configuration as plain values, for a file and back, and what differs between two."""

import dataclasses
from pathlib import Path
from typing import Any

from pcl_fast.config import Config
from pcl_fast.errors import ConfigError, did_you_mean


def to_dict(config: Config) -> dict[str, Any]:
    """The configuration as plain nested values, ready for JSON."""
    return _plain(dataclasses.asdict(config))


def from_dict(values: dict[str, Any], kind: type = Config, where: str = "config.json") -> Any:
    """The inverse of `to_dict`; an unknown key raises ConfigError naming the nearest known one."""
    known = {spec.name: spec for spec in dataclasses.fields(kind)}
    for key in values:
        if key not in known:
            raise ConfigError(f"{where}: unknown key '{key}'.{did_you_mean(key, known)}")
    made: dict[str, Any] = {}
    for key, value in values.items():
        declared = known[key].type
        if isinstance(declared, type) and dataclasses.is_dataclass(declared):
            made[key] = from_dict(value, declared, f"{where}: {key}")
        elif isinstance(value, list):
            made[key] = tuple(value)  # pyright: ignore[reportUnknownArgumentType]
        else:
            made[key] = Path(value) if value is not None and declared == Path | None else value
    return kind(**made)


def differences(old: Config, new: Config, ignored: frozenset[str]) -> list[str]:
    """One line `key: old -> new` for each setting that differs, but for the `ignored` dotted keys."""
    before, after = flatten(to_dict(old)), flatten(to_dict(new))
    return [
        f"{key}: {before.get(key)} -> {after.get(key)}"
        for key in before
        if key not in ignored and before.get(key) != after.get(key)
    ]


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")  # pyright: ignore[reportUnknownArgumentType]
        else:
            flat[prefix + key] = value
    return flat


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}  # pyright: ignore[reportUnknownVariableType]
    if isinstance(value, tuple):
        return [_plain(inner) for inner in value]  # pyright: ignore[reportUnknownVariableType]
    return str(value) if isinstance(value, Path) else value
