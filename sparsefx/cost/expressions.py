"""Costs as sympy expressions of a graph's symbolic sizes and of ratio, n and m."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import sympy

from sparsefx import compat
from sparsefx.config import Dense, Pattern, Sampled
from sparsefx.cost.algebra import Terms, named
from sparsefx.cost.products import BYTES, dense_flops, flops_left, packed_bytes
from sparsefx.cost.work import dense_work, elements, sampled_works
from sparsefx.plan import Site


@dataclass(frozen=True)
class Expressions:
    """What a product costs, in the symbols of its graph and of its pattern.

    Attributes:
        flops_dense: operations of the full product.
        flops: operations that the pattern leaves.
        bytes_dense: bytes that the full product reads and writes.
        bytes_moved: bytes that the sparse one does: kept weights and indices of N:M and of stored
            masks; of sampled products scores, gathers and zeros included.
        weight_bytes: of the weight, only kept values and their indices stored.
        values: what each symbol stood for when the graph was compiled; a size that depends on data
            is not in it.
    """

    flops_dense: sympy.Expr
    flops: sympy.Expr
    bytes_dense: sympy.Expr
    bytes_moved: sympy.Expr
    weight_bytes: sympy.Expr
    values: Mapping[sympy.Symbol, int | float] = field(default_factory=dict)

    def at(self, **values: float) -> dict[str, float]:
        """Return each cost as a number.

        Args:
            values: by a symbol's name, in place of what it stood for.
        """
        known = {symbol: values.get(str(symbol), value) for symbol, value in self.values.items()}
        names = [name for name in self.__dataclass_fields__ if name != "values"]
        return {name: _number(getattr(self, name).subs(known)) for name in names}


def _number(value: Any) -> float:
    return int(value) if value.is_Integer else float(value)


def expressions(site: Site, pattern: Pattern, sampled: Site | None = None) -> Expressions:
    """Return what a product costs as expressions.

    Args:
        site: the product; its symbolic sizes keep their symbols.
        pattern: what it becomes; its numbers become ``ratio``, ``mass``, ``density``, ``n``, ``m``.
        sampled: the layer's forward, where the product is derived from it and uses its sample.
    """
    of, values = named(pattern, site)
    hints = compat.symbol_hints(sizes_of(site))
    one, lead = in_symbols(site), None if sampled is None else in_symbols(sampled)
    return Expressions(
        flops_dense=sympy.sympify(dense_flops(one)),
        flops=sympy.sympify(flops_left(one, of, lead)),
        bytes_dense=sympy.sympify(dense_work(one).moved),
        bytes_moved=sympy.sympify(_moved(one, of, lead)),
        weight_bytes=sympy.sympify(packed_bytes(one, of)),
        values={**hints, **values},
    )


def _moved(site: Site, of: Terms, lead: Site | None) -> Any:
    if isinstance(of.pattern, Sampled):
        chain = [site] if lead is None else [lead, site]
        return sampled_works(chain, of.pattern, of)[-1].moved
    if isinstance(of.pattern, Dense):
        return dense_work(site).moved
    left, _, out = elements(site)
    return BYTES.get(site.dtype, 4) * (left + out) + packed_bytes(site, of)


def sizes_of(site: Site) -> tuple[Any, ...]:
    """Every size of a site."""
    return (site.batch, *site.shape, *(site.channels or ()))


def in_symbols(site: Site) -> Site:
    """Return a site whose sizes are sympy expressions."""
    channels = None if site.channels is None else tuple(map(compat.size_expr, site.channels))
    shape = tuple(map(compat.size_expr, site.shape))
    return replace(site, batch=compat.size_expr(site.batch), shape=shape, channels=channels)
