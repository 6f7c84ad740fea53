"""What a dimension of a tensor is made of, and which dimensions move together.

A dimension is an axis, a product of parts (heads x channels of a head, outermost first) or a sum of
parts (two branches behind one another). Axes are variables: unifying two dimensions makes their
axes one, and an axis that turns out to have parts is bound to them. What no such structure
describes is pinned, with the reason: a pinned axis is never permuted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass


@dataclass(eq=False)
class Axis:
    """A run of ``size`` > 1 coordinates that can only be permuted as one.

    Attributes:
        size: how many.
        bound: what the axis turned out to be; None while it is a variable.
        reason: why it must not be permuted; "" while it may.
    """

    size: int
    bound: Dim | None = None
    reason: str = ""


@dataclass(frozen=True, eq=False)
class Prod:
    """Coordinates that count like digits, the outermost first; without parts, a size of 1."""

    parts: tuple[Dim, ...]


@dataclass(frozen=True, eq=False)
class Sum:
    """Coordinates behind one another."""

    parts: tuple[Dim, ...]


Dim = Axis | Prod | Sum
_Split = Callable[["Dim", int], tuple["Dim", "Dim"]]
UNIT = Prod(())


class UnifyError(Exception):
    """Two structures that no common one refines."""


def new_dim(size: int, reason: str = "") -> Dim:
    """Return a dimension of which nothing is known, or one that is pinned."""
    return UNIT if size == 1 else Axis(size, reason=reason)


def size_of(dim: Dim) -> int:
    """Return the number of coordinates."""
    if isinstance(dim, Axis):
        return dim.size
    sizes = [size_of(part) for part in dim.parts]
    return math.prod(sizes) if isinstance(dim, Prod) else sum(sizes)


def settle(dim: Dim) -> Dim:
    """Return ``dim`` with bound axes replaced, and in one form.

    Products hold no products, sums no sums; an outermost sum of a product is drawn out, since
    (a + b) x c counts as a x c + b x c does.
    """
    if isinstance(dim, Axis):
        if dim.bound is None:
            return dim
        last: Dim = dim
        while isinstance(last, Axis) and last.bound is not None:
            last = last.bound
        dim.bound = settle(last)  # shorten the way for the next one
        return dim.bound
    parts = [settle(part) for part in dim.parts]
    if isinstance(dim, Sum):
        return _sum(parts)
    flat = [p for part in parts for p in (part.parts if isinstance(part, Prod) else (part,))]
    if len(flat) > 1 and isinstance(flat[0], Sum):
        return _sum([settle(Prod((part, *flat[1:]))) for part in flat[0].parts])
    return flat[0] if len(flat) == 1 else Prod(tuple(flat))


def _sum(parts: Iterable[Dim]) -> Dim:
    flat = [p for part in parts for p in (part.parts if isinstance(part, Sum) else (part,))]
    return flat[0] if len(flat) == 1 else Sum(tuple(flat))


def leaves(dim: Dim) -> Iterator[Axis]:
    """Yield the axes that ``dim`` is made of, once for each place."""
    dim = settle(dim)
    if isinstance(dim, Axis):
        yield dim
    else:
        for part in dim.parts:
            yield from leaves(part)


def factors(dim: Dim) -> tuple[Dim, ...]:
    """Return the parts of a product, outermost first; anything else is one part."""
    dim = settle(dim)
    return dim.parts if isinstance(dim, Prod) else (dim,)


def segments(dim: Dim) -> tuple[Dim, ...]:
    """Return the parts of a sum, in order; anything else is one part."""
    dim = settle(dim)
    return dim.parts if isinstance(dim, Sum) else (dim,)


def pin(dim: Dim, reason: str) -> None:
    """Forbid to permute anything of ``dim``; the first reason stays."""
    for axis in leaves(dim):
        axis.reason = axis.reason or reason


def _bind(axis: Axis, dim: Dim) -> None:
    axis.bound = dim
    if axis.reason:
        pin(dim, axis.reason)


def unify(one: Dim, two: Dim) -> None:
    """Make two dimensions move alike; where their structures don't fit, pin both."""
    try:
        _unify(settle(one), settle(two))
    except UnifyError:
        reason = f"two uses split its {size_of(one)} channels in ways that don't fit together"
        pin(one, reason)
        pin(two, reason)


def _unify(one: Dim, two: Dim) -> None:
    if size_of(one) != size_of(two):
        raise UnifyError
    if one is two:
        return
    if isinstance(one, Axis) or isinstance(two, Axis):
        axis, other = (one, two) if isinstance(one, Axis) else (two, one)
        assert isinstance(axis, Axis)
        _bind(axis, other)
    elif isinstance(one, Prod) and isinstance(two, Prod):
        _zip(list(one.parts), list(two.parts), _split_product)
    elif isinstance(one, Sum) and isinstance(two, Sum):
        _zip(list(one.parts), list(two.parts), _split_sum)
    else:
        _unify_mixed(*((one, two) if isinstance(one, Prod) else (two, one)))


def _unify_mixed(product: Dim, total: Dim) -> None:
    """K x c and c + c + ...: the parts of the sum are one and the same c."""
    assert isinstance(product, Prod)
    outer, inner = _split_product(total, size_of(product.parts[0]))
    _unify(settle(inner), settle(Prod(product.parts[1:])))
    _unify(settle(outer), settle(product.parts[0]))


def _zip(ones: list[Dim], twos: list[Dim], split: _Split) -> None:
    """Unify part by part, from the front, splitting the larger of two parts."""
    while ones and twos:
        one, two = settle(ones.pop(0)), settle(twos.pop(0))
        a, b = size_of(one), size_of(two)
        if a > b:
            one, rest = split(one, b)
            ones.insert(0, rest)
        elif b > a:
            two, rest = split(two, a)
            twos.insert(0, rest)
        _unify(settle(one), settle(two))
    if ones or twos:
        raise UnifyError


def _split_product(dim: Dim, outer: int) -> tuple[Dim, Dim]:
    """Take ``dim`` apart into ``outer`` x the rest."""
    dim = settle(dim)
    inner, left = divmod(size_of(dim), outer)
    if left:
        raise UnifyError
    if isinstance(dim, Axis):
        parts = (new_dim(outer), new_dim(inner))
        _bind(dim, Prod(parts))
        return parts
    if isinstance(dim, Prod):
        taken = take(list(dim.parts), outer)
        return Prod(tuple(taken[0])), Prod(tuple(taken[1]))
    rest, counts = new_dim(inner), list[Dim]()
    for part in dim.parts:
        count, left = divmod(size_of(part), inner)
        if left:
            raise UnifyError
        counts.append(new_dim(count))
        _unify(settle(part), settle(Prod((counts[-1], rest))))
    return Sum(tuple(counts)), rest


def take(parts: Sequence[Dim], size: int) -> tuple[list[Dim], list[Dim]]:
    """Take factors of ``size`` coordinates in all off the front of ``parts``.

    Raises:
        UnifyError: when sizes don't divide.
    """
    taken, left = list[Dim](), list(parts)
    while size > 1:
        if not left:
            raise UnifyError
        part = left.pop(0)
        if size_of(part) > size:
            part, rest = _split_product(part, size)
            left.insert(0, rest)
        if size % size_of(part):
            raise UnifyError
        size //= size_of(part)
        taken.append(part)
    return taken, left


def _split_sum(dim: Dim, at: int) -> tuple[Dim, Dim]:
    """Take ``dim`` apart into its first ``at`` coordinates and the rest, 0 < at < size."""
    dim = settle(dim)
    size = size_of(dim)
    if isinstance(dim, Axis):
        parts = (new_dim(at), new_dim(size - at))
        _bind(dim, Sum(parts))
        return parts
    if isinstance(dim, Prod):  # (a + b) x c, where c divides `at`
        inner = Prod(dim.parts[1:])
        if at % size_of(inner):
            raise UnifyError
        first, second = _split_sum(dim.parts[0], at // size_of(inner))
        return Prod((first, inner)), Prod((second, inner))
    head, tail, before = list[Dim](), list(dim.parts), 0
    while before + size_of(tail[0]) <= at:
        before += size_of(tail[0])
        head.append(tail.pop(0))
    if before < at:
        first, second = _split_sum(tail.pop(0), at - before)
        head.append(first)
        tail.insert(0, second)
    return Sum(tuple(head)), Sum(tuple(tail))


def cut(dim: Dim, start: int, stop: int) -> Dim:
    """Return the coordinates from ``start`` to ``stop``; pin all where they can't be told apart."""
    size = size_of(dim)
    if (start, stop) == (0, size):
        return dim
    try:
        if stop < size:
            dim = _split_sum(dim, stop)[0]
        return _split_sum(dim, start)[1] if start else dim
    except UnifyError:
        reason = f"a slice {start}:{stop} cuts through its groups of channels"
        pin(dim, reason)
        return new_dim(stop - start, reason)


def regroup(dims: Sequence[Dim], sizes: Sequence[int]) -> list[Dim]:
    """Return the dimensions of a view of another shape; where blocks don't fit, pin everything."""
    left, out = [part for dim in dims for part in factors(dim)], list[Dim]()
    try:
        for size in sizes:
            taken, left = take(left, size)
            out.append(Prod(tuple(taken)))
    except UnifyError:
        shape = "x".join(str(size_of(dim)) for dim in dims)
        reason = f"a view of {shape} as {'x'.join(map(str, sizes))} mixes its channels with others"
        for dim in dims:
            pin(dim, reason)
        return [new_dim(size, reason) for size in sizes]
    return out
