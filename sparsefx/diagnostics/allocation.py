"""Spend a budget over things that each have several options: fewest errors for the cost.

Each thing's options are points (cost, error). Their lower convex hull is a chain of steps, each
buying less for its cost than the one before. Taking the best steps of all things in turn solves the
Lagrangian relaxation: at every budget at which a step ends, nothing costs as little and errs less
(Shoham & Gersho, IEEE TASSP 36(9), 1988). Between those the last step doesn't fit, and what is left
is spent on whatever option still does.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import NamedTuple


class Option(NamedTuple):
    """What one choice costs, and how wrong it is."""

    cost: int
    error: float


def hull(options: Sequence[Option]) -> list[int]:
    """Return which options lie on the lower convex hull, from the cheapest; errors fall strictly.

    Args:
        options: one at least; of equal ones the earlier counts.
    """
    order = sorted(range(len(options)), key=lambda i: (*options[i], i))
    chain: list[int] = []
    for i in order:
        if chain and options[i].error >= options[chain[-1]].error:
            continue
        while len(chain) > 1 and _gain(options, chain[-2], chain[-1]) <= _gain(
            options, chain[-2], i
        ):
            chain.pop()
        chain.append(i)
    return chain


def _gain(options: Sequence[Option], old: int, new: int) -> float:
    """Error that a step takes away, for what it costs: its slope."""
    return (options[old].error - options[new].error) / (options[new].cost - options[old].cost)


def allocate(things: Sequence[Sequence[Option]], budget: int) -> list[int]:
    """Choose one option of each thing.

    Args:
        things: the options of each.
        budget: what all may cost together.

    Returns:
        For each thing the place of its option.

    Raises:
        ValueError: when the cheapest options cost more than the budget.
    """
    chains = [hull(options) for options in things]
    places = [0] * len(things)
    chosen = [chain[0] for chain in chains]
    left = budget - sum(things[i][chain[0]].cost for i, chain in enumerate(chains))
    if left < 0:
        raise ValueError(f"the cheapest options cost {budget - left}, more than {budget}")
    steps: list[tuple[float, int]] = []

    def offer(i: int) -> None:
        chain, place = chains[i], places[i]
        if place + 1 < len(chain):
            gain = _gain(things[i], chain[place], chain[place + 1])
            heapq.heappush(steps, (-gain, i))

    for i in range(len(things)):
        offer(i)
    while steps:
        _, i = heapq.heappop(steps)
        new = chains[i][places[i] + 1]
        cost = things[i][new].cost - things[i][chosen[i]].cost
        if cost <= left:
            left -= cost
            places[i] += 1
            chosen[i] = new
            offer(i)
    _spend(things, chosen, left)
    return chosen


def _spend(things: Sequence[Sequence[Option]], chosen: list[int], left: int) -> None:
    """Take what still fits, the largest gain first; options off the hull are among it."""
    while True:
        fits = [
            (options[chosen[i]].error - option.error, i, place)
            for i, options in enumerate(things)
            for place, option in enumerate(options)
            if option.cost - options[chosen[i]].cost <= left
            and option.error < options[chosen[i]].error
        ]
        if not fits:
            return
        _, i, place = max(fits, key=lambda found: (found[0], -found[1], -found[2]))
        left -= things[i][place].cost - things[i][chosen[i]].cost
        chosen[i] = place
