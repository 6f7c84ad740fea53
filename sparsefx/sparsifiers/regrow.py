"""What a round of prune-and-grow takes: which weights go, random draws, optimizer state at rest."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from sparsefx.errors import SparsifierError

SIGNS = ("separate", "together")


def smallest(values: Tensor, zeta: float, signs: str) -> Tensor:
    """Return the places of the values nearest to zero, the nearest first.

    Args:
        values: float [n].
        zeta: the share, rounded down to a whole number of values.
        signs: "separate" takes the share of the negative values and of the others each, as Mocanu
            et al. do; "together" of all by magnitude.

    Returns:
        int64 places; equal magnitudes in the order of their places.
    """
    size = values.abs()
    if signs == "together":
        return size.argsort(stable=True)[: share_of(zeta, len(values))]
    below = values < 0  # zero counts with the positive ones
    chosen = torch.cat([_first(size, at, zeta) for at in (below, ~below)]).sort().values
    return chosen[size[chosen].argsort(stable=True)]


def largest(values: Tensor, count: int) -> Tensor:
    """Return int64 places of the ``count`` largest of float [n]; of equal ones the first.

    Selection instead of a sort: there may be millions of values.
    """
    if not count:
        return torch.empty(0, dtype=torch.int64, device=values.device)
    edge = values.kthvalue(len(values) - count + 1).values
    above, at = ((values > edge).nonzero().flatten(), (values == edge).nonzero().flatten())
    return torch.cat([above, at[: count - len(above)]])


def share_of(zeta: float, n: int) -> int:
    """Return floor(zeta * n), of the decimal number that was meant: 0.29 * 100 is 28.999..."""
    return math.floor(zeta * n + 1e-9)


def generator_for(seed: int, step: int, layer: str) -> torch.Generator:
    """Return a CPU generator that a seed, a step and a layer decide, on every rank and device."""
    digest = hashlib.sha256(f"{seed} {step} {layer}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def drawn(n: int, count: int, generator: torch.Generator) -> Tensor:
    """Return ``count`` different places of ``n``, int64, on the CPU."""
    return torch.randperm(n, generator=generator)[:count]


@torch.no_grad()
def clear_state(optimizer: torch.optim.Optimizer, parameter: Tensor, at: Tensor) -> None:
    """Set optimizer state to zero where ``at`` (bool, the parameter's shape) says so.

    Every floating tensor of the parameter's shape: momentum, both moments of Adam, sums of squares.
    State of another shape (Adafactor's rows, the history of L-BFGS) stays.
    """
    for value in optimizer.state.get(parameter, {}).values():
        if isinstance(value, Tensor) and value.shape == at.shape and value.is_floating_point():
            value.masked_fill_(at, 0)


def check_share(owner: str, key: str, value: object) -> float:
    """Return a number in [0, 1], or raise SparsifierError."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise SparsifierError(f"{owner}: {key}={value!r} must be a number in [0, 1]")
    return float(value)


def check_signs(owner: str, signs: str) -> str:
    """Return one of ``SIGNS``, or raise SparsifierError."""
    if signs not in SIGNS:
        raise SparsifierError(f"{owner}: signs={signs!r} must be 'separate' or 'together'")
    return signs


def check_std(owner: str, std: float) -> float:
    """Return a standard deviation, or raise SparsifierError."""
    if isinstance(std, bool) or not isinstance(std, int | float) or not 0 <= std < math.inf:
        raise SparsifierError(f"{owner}: std={std!r} must be a finite number of at least 0")
    return float(std)


def _first(size: Tensor, at: Tensor, zeta: float) -> Tensor:
    places = at.nonzero().flatten()
    return places[size[places].argsort(stable=True)[: share_of(zeta, len(places))]]
