"""Numbers that follow the step: frozen, compared by value, plain data, called with a step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from sparsefx.errors import SparsifierError

Schedule = Callable[[int], float]


@dataclass(frozen=True)
class Constant:
    """The same value at every step."""

    value: float

    def __post_init__(self) -> None:
        """Check the value."""
        _number("Constant", "value", self.value)

    def __call__(self, step: int) -> float:
        """Return the value."""
        return self.value


@dataclass(frozen=True)
class Linear:
    """From ``start`` to ``end`` in a straight line over ``steps`` steps, from ``begin`` on."""

    start: float
    end: float
    steps: int
    begin: int = 0

    def __post_init__(self) -> None:
        """Check every value."""
        _check_way("Linear", self.start, self.end, self.steps, self.begin)

    def __call__(self, step: int) -> float:
        """Return the value at a step."""
        return self.end + (self.start - self.end) * _left(step, self.begin, self.steps)


@dataclass(frozen=True)
class Cubic:
    """``end + (start - end) * (1 - t / steps)**3``, t counted from ``begin``: fast at first.

    Zhu & Gupta, "To prune, or not to prune" (arXiv 1710.01878), eq. 1.
    """

    start: float
    end: float
    steps: int
    begin: int = 0

    def __post_init__(self) -> None:
        """Check every value."""
        _check_way("Cubic", self.start, self.end, self.steps, self.begin)

    def __call__(self, step: int) -> float:
        """Return the value at a step."""
        return self.end + (self.start - self.end) * _left(step, self.begin, self.steps) ** 3


@dataclass(frozen=True)
class Step:
    """A value that jumps: ``Step(((0, 40), (1000, 100)))`` is 40, and 100 from step 1000 on.

    Args:
        values: (first step, value) pairs, steps rising from 0.
    """

    values: tuple[tuple[int, float], ...]

    def __post_init__(self) -> None:
        """Check every pair; lists become tuples."""
        pairs = tuple((int(step), value) for step, value in self.values)
        starts = [step for step, _ in pairs]
        if not pairs or starts[0] != 0 or starts != sorted(set(starts)):
            raise SparsifierError(
                f"Step: values={self.values!r} must be (step, value) pairs with steps rising from 0"
            )
        for _, value in pairs:
            _number("Step", "value", value)
        object.__setattr__(self, "values", pairs)

    def __call__(self, step: int) -> float:
        """Return the value at a step."""
        return [value for start, value in self.values if start <= step][-1]


def as_schedule(owner: str, key: str, value: object) -> Schedule:
    """Return a schedule as it is, a number as a :class:`Constant`.

    Raises:
        SparsifierError: it is neither.
    """
    if callable(value):
        return value
    return Constant(_number(owner, key, value))


def _left(step: int, begin: int, steps: int) -> float:
    """What is left of the way at a step, from 1 to 0."""
    return 1 - min(max((step - begin) / steps, 0.0), 1.0)


def _check_way(owner: str, start: float, end: float, steps: int, begin: int) -> None:
    _number(owner, "start", start)
    _number(owner, "end", end)
    whole_number(owner, "steps", steps, 1)
    whole_number(owner, "begin", begin, 0)


def _number(owner: str, key: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise SparsifierError(f"{owner}: {key}={value!r} must be a finite number or a schedule")
    return value


def whole_number(owner: str, key: str, value: object, least: int) -> int:
    """Return an int of at least ``least``.

    Raises:
        SparsifierError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise SparsifierError(f"{owner}: {key}={value!r} must be an int of at least {least}")
    return value
