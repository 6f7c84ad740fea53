"""What the masks of methods without groups hold: any entries, or whole units, up to a share."""

from __future__ import annotations

from dataclasses import dataclass

from typing_extensions import TypeVar

from sparsefx import checks
from sparsefx.config import NM
from sparsefx.errors import ConfigError

UNITS = ("weight", "filter", "head", "block")
_SCALE = 10**9  # densities are kept in checkpoints as whole numbers


@dataclass(frozen=True)
class Unstructured:
    """Any entries of a weight, or all of a unit's together.

    Args:
        density: share of the entries that is kept, ``0 < density <= 1``; None is what the method
            finds.
        unit: what is kept or dropped as a whole: a "weight", a "filter" (an output unit of a
            linear layer, too), a "head" or a "block".

    Raises:
        ConfigError: for values outside these ranges.
    """

    density: float | None = None
    unit: str = "weight"

    def __post_init__(self) -> None:
        """Check every value."""
        checks.one_of("Unstructured", "unit", self.unit, UNITS)
        if self.density is None:
            return
        if not 0 < checks.number("Unstructured", "density", self.density) <= 1:
            raise ConfigError(f"Unstructured: density={self.density!r} must be in (0, 1]")

    def __str__(self) -> str:
        """Return the short form that reports show."""
        name = "unstructured" if self.unit == "weight" else f"whole {self.unit}s"
        return name if self.density is None else f"{name} {self.density:.4g}"


MaskPattern = NM | Unstructured
P = TypeVar("P", bound=MaskPattern, default=NM)


def numbers_of(pattern: MaskPattern) -> tuple[int, int, int]:
    """Return the three numbers that a checkpoint keeps of a pattern."""
    if isinstance(pattern, NM):
        return pattern.n, pattern.m, int(pattern.transposable)
    share = -1 if pattern.density is None else round(pattern.density * _SCALE)
    return -1 - UNITS.index(pattern.unit), share, 0


def written(numbers: list[int]) -> str:
    """Return the pattern that :func:`numbers_of` gave, as text."""
    first, second, transposable = numbers
    if first > 0:
        return f"{first}:{second}" + " transposable" * bool(transposable)
    return str(Unstructured(None if second < 0 else second / _SCALE, UNITS[-1 - first]))
