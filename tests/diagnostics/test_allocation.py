"""The allocation: within the budget, and as good as trying everything where the hull says so."""

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsefx.diagnostics.allocation import Option, allocate, hull

points = st.tuples(st.integers(0, 20), st.integers(0, 30).map(float)).map(lambda p: Option(*p))
problems = st.lists(st.lists(points, min_size=1, max_size=4), min_size=1, max_size=4)


def best(things: Sequence[Sequence[Option]], budget: int) -> float:
    """The least error of every combination that the budget allows."""
    return min(
        sum(option.error for option in chosen)
        for chosen in itertools.product(*things)
        if sum(option.cost for option in chosen) <= budget
    )


def error_of(things: Sequence[Sequence[Option]], chosen: Sequence[int]) -> float:
    return sum(options[place].error for options, place in zip(things, chosen, strict=True))


def cost_of(things: Sequence[Sequence[Option]], chosen: Sequence[int]) -> int:
    return sum(options[place].cost for options, place in zip(things, chosen, strict=True))


def test_hull_drops_what_buys_too_little():
    options = [Option(0, 10), Option(2, 9), Option(4, 2), Option(5, 3), Option(9, 0), Option(0, 11)]
    assert hull(options) == [0, 2, 4]
    assert hull([Option(3, 1.0), Option(3, 1.0)]) == [0]


@given(options=st.lists(points, min_size=1, max_size=8))
def test_hull_is_below_every_option(options: list[Option]):
    chain = [options[place] for place in hull(options)]
    steps = list(itertools.pairwise(chain))
    gains = [(a.error - b.error) / (b.cost - a.cost) for a, b in steps]
    assert all(b.cost > a.cost and b.error < a.error for a, b in steps)
    assert all(x > y for x, y in itertools.pairwise(gains))
    for option in options:
        assert option.cost >= chain[0].cost
        below = [
            a.error + (b.error - a.error) * (option.cost - a.cost) / (b.cost - a.cost)
            for a, b in steps
            if a.cost <= option.cost <= b.cost
        ]
        assert all(option.error >= bound - 1e-9 for bound in below or [chain[-1].error])


@given(things=problems, spare=st.integers(0, 40))
def test_a_step_from_the_best_at_most(things: list[list[Option]], spare: int):
    budget = sum(min(option.cost for option in options) for options in things) + spare
    chosen = allocate(things, budget)
    assert cost_of(things, chosen) <= budget
    chains = [[options[place] for place in hull(options)] for options in things]
    steps = [a.error - b.error for chain in chains for a, b in itertools.pairwise(chain)]
    assert error_of(things, chosen) <= best(things, budget) + max(steps, default=0.0) + 1e-9


@given(things=problems, share=st.floats(0, 1))
def test_the_best_where_a_step_of_the_hull_ends(things: list[list[Option]], share: float):
    chains = [[options[place] for place in hull(options)] for options in things]
    steps = sorted(
        ((b.error - a.error) / (b.cost - a.cost), b.cost - a.cost)
        for chain in chains
        for a, b in itertools.pairwise(chain)
    )
    taken = steps[: round(share * len(steps))]
    budget = sum(chain[0].cost for chain in chains) + sum(cost for _, cost in taken)
    assert error_of(things, allocate(things, budget)) <= best(things, budget) + 1e-9


def test_what_is_left_is_spent_off_the_hull():
    things = [[Option(0, 10), Option(4, 8), Option(10, 0)]]
    assert allocate(things, 5) == [1]
    assert allocate(things, 10) == [2]


def test_too_little():
    with pytest.raises(ValueError, match="the cheapest options cost 7, more than 6"):
        allocate([[Option(3, 0.0), Option(5, 0.0)], [Option(4, 1.0)]], 6)
