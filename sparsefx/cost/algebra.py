"""Sizes and a pattern's numbers, as integers or as sympy expressions; one code for both."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import sympy
import torch

from sparsefx import compat
from sparsefx.patterns import NM, Masked, Pattern, Sampled
from sparsefx.plan import Site

Amount = Any  # int, float or sympy.Expr


class share(sympy.Function):  # type: ignore[misc]  # printed as it is written
    """``int(ratio * size)``, in floating point: sympy's own floor would be exact, and differ."""

    nargs = 2
    is_integer = True
    is_nonnegative = True

    @classmethod
    def eval(cls, ratio: Any, size: Any) -> Any:
        """Return the number once both are numbers."""
        if ratio.is_number and size.is_number:
            return sympy.Integer(int(float(ratio) * int(size)))
        return None


class share_up(share):
    """``ceil(ratio * size)``."""

    @classmethod
    def eval(cls, ratio: Any, size: Any) -> Any:
        """Return the number once both are numbers."""
        if ratio.is_number and size.is_number:
            return sympy.Integer(math.ceil(float(ratio) * int(size)))
        return None


class share_near(share):
    """``round(ratio * size)``."""

    @classmethod
    def eval(cls, ratio: Any, size: Any) -> Any:
        """Return the number once both are numbers."""
        if ratio.is_number and size.is_number:
            return sympy.Integer(round(float(ratio) * int(size)))
        return None


class index_bits(sympy.Function):  # type: ignore[misc]
    """Bits of an index into groups of m."""

    nargs = 1
    is_integer = True
    is_positive = True

    @classmethod
    def eval(cls, m: Any) -> Any:
        """Return the number once m is one."""
        return sympy.Integer(math.ceil(math.log2(int(m)))) if m.is_number else None


def symbolic(value: Amount) -> bool:
    """Whether an amount is an expression."""
    return isinstance(value, sympy.Basic)


def number(size: Any) -> Amount:
    """Return a size; the example's where it is a SymInt; an expression as it is."""
    return compat.size_hint(size) if isinstance(size, torch.SymInt) else size


def least(a: Amount, b: Amount) -> Amount:
    """The smaller of two amounts."""
    return sympy.Min(a, b) if symbolic(a) or symbolic(b) else min(a, b)


def most(a: Amount, b: Amount) -> Amount:
    """The larger of two amounts."""
    return sympy.Max(a, b) if symbolic(a) or symbolic(b) else max(a, b)


def scaled(ratio: Amount, size: Amount, how: type[share] = share) -> Amount:
    """Return ``int(ratio * size)``, or what ``how`` says."""
    found = how(ratio, size)
    return int(found) if not symbolic(ratio) and not symbolic(size) else found


# --- a pattern's numbers


@dataclass(frozen=True)
class Terms:
    """A pattern and its numbers, or the symbols that stand for them."""

    pattern: Pattern
    ratio: Amount = None  # of Sampled; of Masked the density
    mass: Amount = None
    n: Amount = None
    m: Amount = None

    def pairs(self, depth: Amount) -> Amount:
        """How many of ``depth`` pairs a Sampled computes; ``Sampled.size``, for expressions too."""
        assert isinstance(self.pattern, Sampled)
        if not symbolic(depth) and not any(map(symbolic, (self.ratio, self.mass))):
            return self.pattern.size(depth)
        by_mass = self.ratio is None
        asked = share_up(self.mass, depth) if by_mass else share(self.ratio, depth)
        k = sympy.Min(depth, sympy.Max(self.pattern.min_k, asked))
        if self.pattern.estimator == "bernoulli":
            return sympy.Min(depth, k + sympy.floor(k / 8) + 32)
        return sympy.Min(depth, k + 1) if self.pattern.estimator == "topk_mean" else k


def terms(pattern: Pattern, site: Site) -> Terms:
    """Return a pattern's numbers; a stored mask's are its site's."""
    if isinstance(pattern, NM):
        return Terms(pattern, n=pattern.n, m=pattern.m)
    if isinstance(pattern, Masked):
        return Terms(pattern, ratio=site.mask_density)
    if isinstance(pattern, Sampled):
        ratio = pattern.ratio
        now = ratio if ratio is None or isinstance(ratio, float) else ratio.ratio  # a schedule's
        return Terms(pattern, ratio=now, mass=pattern.mass)
    return Terms(pattern)


def named(pattern: Pattern, site: Site) -> tuple[Terms, dict[Any, Any]]:
    """Return symbols in place of a pattern's numbers, and what each stands for."""
    known = terms(pattern, site)
    values: dict[Any, Any] = {}

    def symbol(name: str, value: Amount) -> Any:
        if value is None:
            return None
        whole = isinstance(value, int)
        made = sympy.Symbol(name, positive=True, integer=True if whole else None)
        values[made] = value
        return made

    ratio = "density" if isinstance(pattern, Masked) else "ratio"
    given = Terms(
        pattern,
        ratio=symbol(ratio, known.ratio),
        mass=symbol("mass", known.mass),
        n=symbol("n", known.n),
        m=symbol("m", known.m),
    )
    return given, values
