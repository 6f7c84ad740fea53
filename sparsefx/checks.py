"""Checks of what a user passes: each refusal names the owner, the key and the value."""

from __future__ import annotations

import math

from sparsefx.errors import ConfigError


def one_of(owner: str, key: str, value: object, allowed: tuple[str, ...]) -> None:
    """Refuse a value that is not one of ``allowed``."""
    if not isinstance(value, str) or value not in allowed:
        raise ConfigError(f"{owner}: {key}={value!r} is not one of {', '.join(map(repr, allowed))}")


def flag(owner: str, key: str, value: object) -> None:
    """Refuse what is not True or False."""
    if not isinstance(value, bool):
        raise ConfigError(f"{owner}: {key}={value!r} must be True or False")


def integer(owner: str, key: str, value: object) -> None:
    """Refuse what is not an int."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{owner}: {key}={value!r} must be an int, got {type(value).__name__}")


def number(owner: str, key: str, value: object) -> float:
    """Return a finite number as a float; refuse anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{owner}: {key}={value!r} must be a number, got {type(value).__name__}")
    try:
        number = float(value)
    except OverflowError:  # an int that no float holds
        number = math.inf
    if not math.isfinite(number):
        raise ConfigError(f"{owner}: {key}={value!r} must be finite")
    return number
