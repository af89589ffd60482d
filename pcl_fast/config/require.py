"""What every part of the configuration validates itself with."""

from pcl_fast.errors import ConfigError


def require(condition: bool, flag: str, value: object, fix: str) -> None:
    """ConfigError naming the flag, its value and the fix, unless the condition holds."""
    if not condition:
        raise ConfigError(f"--{flag} {value}: {fix}")
