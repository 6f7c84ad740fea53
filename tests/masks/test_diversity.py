"""mask_diversity: against counting one by one, and against the numbers in print."""

from itertools import combinations, product
from math import comb

import pytest

from sparsefx.errors import MaskError
from sparsefx.masks import mask_diversity, patterns


def count_tiles(n, m):
    lines = list(combinations(range(m), n))
    return sum(
        all(sum(col in line for line in rows) == n for col in range(m))
        for rows in product(lines, repeat=m)
    )


@pytest.mark.parametrize(
    ("n", "m"), [(1, 2), (1, 3), (2, 3), (1, 4), (2, 4), (3, 4), (1, 5), (4, 5)]
)
def test_tiles_one_by_one(n, m):
    assert mask_diversity(n, m, transposable=True).exact == count_tiles(n, m)


@pytest.mark.parametrize(
    ("n", "m", "count"),
    [(2, 5, 2040), (3, 6, 297200), (4, 8, 116963796250), (5, 10, 6736218287430460752)],
)
def test_tiles_in_print(n, m, count):  # OEIS A001499 and A058527
    assert mask_diversity(n, m, transposable=True).exact == count


@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 3), (2, 4), (3, 4)])
def test_the_exact_solver_knows_as_many_patterns(n, m):
    assert len(patterns.legal_patterns(m, m, n)) == mask_diversity(n, m, transposable=True).exact


def test_both_numbers_for_64_weights():
    rows, tiles = mask_diversity(2, 4, elements=64), mask_diversity(4, 8, True, 64)
    assert rows.exact == rows.formula == comb(4, 2) ** 16
    assert tiles.formula == 17_557_585_920_000
    assert tiles.exact < rows.exact < tiles.formula  # why both are told
    assert mask_diversity(2, 4, True, 64).exact == 90**4
    assert mask_diversity(1, 4, True, 64).exact == 24**4
    assert mask_diversity(1, 4, True, 64).formula == 24**4


def test_the_count_is_symmetric_and_the_formula_is_not():
    two, six = (mask_diversity(n, 8, transposable=True) for n in (2, 6))
    assert two.exact == six.exact == 187_530_840
    assert two.formula < six.formula


def test_both_are_labelled_in_print():
    one_tile = mask_diversity(4, 8, True)
    assert str(one_tile) == "116963796250 counted, 17557585920000 by the published formula"
    assert one_tile == mask_diversity(4, 8, transposable=True, elements=64)
    assert str(mask_diversity(4, 8)) == "70 counted, 70 by the published formula"


def test_no_weights_have_one_mask():
    assert mask_diversity(2, 4, elements=0).exact == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((2, 4, False, 6), "elements=6 is not a multiple of 4, one block of m=4"),
        ((2, 4, True, 24), "elements=24 is not a multiple of 16, one block of m=4"),
        ((2, 4, False, -4), "elements=-4 is not a multiple"),
        ((2, 4, False, 4.0), "elements=4.0 is of type float; pass an int"),
        ((8, 16, True), "m=16 is too large to count tiles of: pass m <= 14"),
        ((4, 4), "n=4 of every m=4 prunes nothing"),
    ],
)
def test_messages(arguments, message):
    with pytest.raises(MaskError, match=message):
        mask_diversity(*arguments)
