"""From which batch on sparse products take less time than full ones."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy

from sparsefx import compat
from sparsefx.config import Sampled
from sparsefx.cost.calibrated import pace_of
from sparsefx.cost.expressions import sizes_of
from sparsefx.cost.paces import MARGIN, Pace
from sparsefx.cost.work import dense_work, sampled_work, total
from sparsefx.plan import Site

LARGEST = 2**20  # a break-even beyond it is called never


@dataclass(frozen=True)
class BreakEven:
    """The smallest size from which sparse is expected to win.

    Attributes:
        unit: what the size is: "batch", or "rows" of a matrix product whose sizes are all fixed.
        here: the size that was compiled.
        start: the smallest one that sparse wins at, and at every larger one; None is never.
    """

    unit: str
    here: int
    start: int | None

    @property
    def at(self) -> str:
        """The size that was compiled, in words."""
        return self._of(self.here)

    def __str__(self) -> str:
        """Say from where on, or never."""
        if self.start is None:
            return "never sparse"
        return f"sparse from {self._of(self.start)} on"

    def _of(self, size: int) -> str:
        return f"batch {size}" if self.unit == "batch" else f"{size} row{'s' * (size != 1)}"


def break_even(sites: Sequence[Site], pattern: Sampled) -> BreakEven | None:
    """Return from where on sampled products win.

    Where the sites hold one symbol, it is the batch. Where all sizes are fixed, the question is
    asked of a convolution's or a batched product's batch, and of other products' rows.

    Args:
        sites: a product and those derived from it, which are worth what their sum is worth.
        pattern: what they become.

    Returns:
        None where there are several symbols, sizes that depend on data, or a size below which
        alone sparse wins.
    """
    every = [size for site in sites for size in sizes_of(site)]
    hints = compat.symbol_hints(every)
    symbols = set().union(*(_amount(size).free_symbols for size in every if not _fixed(size)))
    bare = [_bare(site) for site in sites]
    if len(symbols) == 1 and symbols == hints.keys():
        ((symbol, here),) = hints.items()
        unit = "batch"
    elif not symbols:
        symbol = sympy.Symbol("batch", integer=True, positive=True)
        unit, here = _unit(sites[0])
        bare = [_grown(site, symbol) for site in bare]
    else:
        return None
    if here <= 0:
        return None
    pace = pace_of(sites[0].kind, sites[0].device, sites[0].dtype)
    start = _start(tuple(bare), symbol, pattern, pace)
    return None if start == 0 else BreakEven(unit, here, start)


def _bare(site: Site) -> Site:
    """What of a site costs depend on, so that layers that are alike are asked about once."""
    m, n, k = map(_amount, site.shape)
    channels: Any = None if site.channels is None else tuple(map(_amount, site.channels))
    bare = Site("", site.role, site.kind, "", (m, n, k), site.dtype, site.device, 0)
    return replace(bare, channels=channels, batch=_amount(site.batch))


def _fixed(size: Any) -> bool:
    return isinstance(size, int)


def _amount(size: Any) -> Any:
    """An integer as it is, which is the faster to compute with, or an expression."""
    return size if _fixed(size) else compat.size_expr(size)


def _unit(site: Site) -> tuple[str, int]:
    if site.channels is not None:
        return "batch", site.channels[3]
    return ("batch", site.batch) if site.kind == "bmm" else ("rows", site.shape[_rows(site)])


def _rows(site: Site) -> int:
    return 2 if site.role == "grad_weight" else 0


def _grown(site: Site, batch: Any) -> Site:
    """A site of fixed sizes, at any batch."""
    if site.kind == "bmm":
        return replace(site, batch=batch)
    each, place = 1, _rows(site)
    if site.channels is not None:
        each = site.shape[place] // site.channels[3] if site.channels[3] else 0
        site = replace(site, channels=(*site.channels[:3], batch))
    shape = [each * batch if axis == place else size for axis, size in enumerate(site.shape)]
    return replace(site, shape=tuple(shape))


@functools.lru_cache(4096)
def _start(sites: tuple[Site, ...], symbol: Any, pattern: Sampled, pace: Pace) -> int | None:
    """The smallest size that sparse wins at; None is never, 0 that it can't be said."""
    dense = pace.time(total(map(dense_work, sites)))
    gap = pace.time(sampled_work(sites, pattern)) - MARGIN * dense
    line = _line(gap, symbol)

    def wins(size: int) -> bool:
        return bool(gap.subs(symbol, size) <= 0 if line is None else line[0] + line[1] * size <= 0)

    if wins(1):
        return 1 if wins(LARGEST) else 0
    if not wins(LARGEST):
        return None
    if line is not None:
        return math.ceil(-line[0] / line[1])
    losing, winning = 1, LARGEST
    while winning - losing > 1:
        middle = (losing + winning) // 2
        losing, winning = (losing, middle) if wins(middle) else (middle, winning)
    return winning


def _line(gap: Any, symbol: Any) -> tuple[float, float] | None:
    """Offset and slope of a linear expression; None of another."""
    if not gap.is_polynomial(symbol):
        return None  # pairs are chosen from the batch, so that their number is cut to an integer
    found = sympy.Poly(gap, symbol)
    if found.degree() > 1:
        return None
    return float(found.coeff_monomial(1)), float(found.coeff_monomial(symbol))
