"""How many weights each layer of a sparse network starts with, as whole numbers.

Erdos-Renyi: Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse
connectivity inspired by network science" (Nature Communications 2018), eq. 1. Its form for kernels,
ERK: Evci et al., "Rigging the lottery" (ICML 2020), section 3, with their way of dealing with
layers that would keep more than all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeGuard

from sparsefx.errors import SparsifierError

INITS = ("erdos_renyi", "erk", "uniform")
Shape = Sequence[int]


def scale(shape: Shape, init: str) -> float:
    """Return what epsilon is multiplied with to give a layer's density, uncapped.

    Args:
        shape: [out, in per group, *taps].
        init: "erdos_renyi" gives (n + m) / (n m) whatever the taps are; "erk" gives (n + m + k1 +
            ...) / (n m k1 ...); "uniform" gives 1.
    """
    if init == "uniform":
        return 1.0
    counted = shape if init == "erk" else shape[:2]
    return sum(counted) / _size(counted)


def counts_for_density(shapes: Sequence[Shape], density: float, init: str) -> list[int]:
    """Return how many weights each layer keeps, ``round(density * all)`` in total.

    Args:
        shapes: [out, in per group, *taps] of every layer.
        density: of all layers together, ``0 < density <= 1``.
        init: one of ``INITS``; epsilon is found, layers that it would fill over are kept whole.
    """
    sizes = [_size(shape) for shape in shapes]
    scales = [
        scale(shape, init) if size else 0.0 for shape, size in zip(shapes, sizes, strict=True)
    ]
    densities = _capped(scales, sizes, density)
    exact = [share * size for share, size in zip(densities, sizes, strict=True)]
    return _whole(exact, sizes, round(density * sum(sizes)))


def counts_for_epsilon(shapes: Sequence[Shape], epsilon: float, init: str) -> list[int]:
    """Return ``round(min(1, epsilon * scale) * size)`` of every layer; arguments as above."""
    sizes = [_size(shape) for shape in shapes]
    return [
        round(min(1.0, epsilon * scale(shape, init)) * size) if size else 0
        for shape, size in zip(shapes, sizes, strict=True)
    ]


def counts_for(
    shapes: Mapping[str, Shape], density: float | None, epsilon: float | None, init: str
) -> dict[str, int]:
    """Return layer -> how many weights it keeps, for one of a density and an epsilon.

    Raises:
        SparsifierError: a layer that has weights would keep none, so nothing would pass it.
    """
    sizes = list(shapes.values())
    if density is not None:
        counts = counts_for_density(sizes, density, init)
    else:
        assert epsilon is not None
        counts = counts_for_epsilon(sizes, epsilon, init)
    for (name, shape), count in zip(shapes.items(), counts, strict=True):
        if not count and _size(shape):
            raise SparsifierError(
                f"layer {name!r}, {tuple(shape)}, would keep 0 weights: raise density or epsilon, "
                "or leave it dense by a rule"
            )
    return dict(zip(shapes, counts, strict=True))


def check_start(owner: str, density: object, epsilon: object, init: object) -> None:
    """Raise SparsifierError unless one of density and epsilon is given, in its range."""
    if init not in INITS:
        raise SparsifierError(f"{owner}: init={init!r} is not one of {', '.join(map(repr, INITS))}")
    if density is not None and epsilon is not None:
        raise SparsifierError(
            f"{owner}: density={density!r} and epsilon={epsilon!r} say the same: give one of them"
        )
    if density is not None and not (_is_number(density) and 0 < density <= 1):
        raise SparsifierError(f"{owner}: density={density!r} must be a number in (0, 1]")
    if epsilon is not None and init == "uniform":
        raise SparsifierError(
            f"{owner}: epsilon={epsilon!r} with init='uniform': give density there"
        )
    if epsilon is not None and not (_is_number(epsilon) and 0 < epsilon < math.inf):
        raise SparsifierError(f"{owner}: epsilon={epsilon!r} must be a finite number above 0")


def _size(shape: Shape) -> int:
    size = 1
    for side in shape:
        size *= side
    return size


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _capped(scales: Sequence[float], sizes: Sequence[int], density: float) -> list[float]:
    """Densities in proportion to the scales, at most 1, that keep ``density`` of all weights.

    A layer over 1 is kept whole and the others share what is left; epsilon grows by that, so no
    layer comes back from 1.
    """
    whole: set[int] = {i for i, size in enumerate(sizes) if not size}
    while len(whole) < len(sizes):
        rest = [i for i in range(len(sizes)) if i not in whole]
        budget = density * sum(sizes) - sum(sizes[i] for i in whole)
        epsilon = budget / sum(scales[i] * sizes[i] for i in rest)
        over = {i for i in rest if epsilon * scales[i] > 1}
        if not over:
            return [1.0 if i in whole else epsilon * scales[i] for i in range(len(sizes))]
        whole |= over
    return [1.0] * len(sizes)


def _whole(exact: Sequence[float], sizes: Sequence[int], total: int) -> list[int]:
    """Whole numbers that sum to ``total``: floors, and one more where most was cut off."""
    floors = [min(math.floor(value), size) for value, size in zip(exact, sizes, strict=True)]
    by_rest = sorted(range(len(exact)), key=lambda i: (floors[i] - exact[i], i))
    for i in [i for i in by_rest if floors[i] < sizes[i]][: total - sum(floors)]:
        floors[i] += 1
    return floors
