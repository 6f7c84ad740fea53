"""Dimensions: products, sums, what unifies, and the index of a permutation."""

import pytest
import torch

from sparsefx.permutation.axes import (
    UNIT,
    Axis,
    Prod,
    Sum,
    cut,
    leaves,
    new_dim,
    pin,
    regroup,
    settle,
    size_of,
    unify,
)
from sparsefx.permutation.places import Order, block_of, permuted, places


def roots(*dims) -> list[int]:
    """Number the axes of some dimensions by identity."""
    seen: dict[int, int] = {}
    return [seen.setdefault(id(axis), len(seen)) for dim in dims for axis in leaves(dim)]


def test_unify_makes_one_of_two():
    one, two, three = new_dim(6), new_dim(6), new_dim(6)
    unify(one, two)
    unify(three, two)
    assert roots(one, two, three) == [0, 0, 0]
    pin(one, "no")
    assert [axis.reason for axis in leaves(three)] == ["no"]


def test_products_are_refined():
    one, two = new_dim(24), new_dim(24)
    regroup([one], (2, 12))
    regroup([two], (6, 4))
    unify(one, two)
    assert [axis.size for axis in leaves(one)] == [2, 3, 4]
    assert roots(one, two) == [0, 1, 2, 0, 1, 2]


def test_products_that_do_not_fit_are_pinned():
    one, two = new_dim(6), new_dim(6)
    regroup([one], (2, 3))
    regroup([two], (3, 2))
    unify(one, two)
    assert all("ways that don't fit together" in axis.reason for axis in leaves(one))
    assert all(axis.reason for axis in leaves(two))


def test_sums_are_refined():
    one, two = new_dim(8), new_dim(8)
    cut(one, 0, 3)
    cut(two, 5, 8)
    unify(one, two)
    assert [axis.size for axis in leaves(one)] == [3, 2, 3]
    assert roots(one, two) == [0, 1, 2, 0, 1, 2]


def test_a_sum_that_is_viewed_as_a_product_has_equal_parts():
    whole = Sum((new_dim(8), new_dim(8)))
    outer, inner = regroup([whole], (2, 8))
    assert size_of(outer) == 2
    assert roots(whole, inner) == [0, 0, 0]


def test_a_product_unifies_with_a_sum_of_equal_parts():
    product, total = Prod((new_dim(2), new_dim(8))), Sum((new_dim(8), new_dim(8)))
    unify(product, total)
    assert roots(product, total) == [0, 0, 0, 0]
    assert not any(axis.reason for axis in leaves(total))


def test_a_product_and_an_uneven_sum_are_pinned():
    product, total = Prod((new_dim(2), new_dim(8))), Sum((new_dim(6), new_dim(10)))
    unify(product, total)
    assert all(axis.reason for axis in (*leaves(product), *leaves(total)))


def test_cutting_through_blocks_pins_them():
    product = Prod((new_dim(2), new_dim(8)))
    half = cut(product, 0, 8)
    assert roots(half, product.parts[1]) == [0, 0]
    part = cut(Prod((new_dim(2), new_dim(8))), 0, 4)
    assert "cuts through its groups" in next(leaves(part)).reason


def test_units_vanish():
    axis = new_dim(5)
    assert settle(Prod((UNIT, axis, new_dim(1)))) is axis
    assert regroup([axis], (1, 5, 1)) != []
    assert new_dim(1) is UNIT


def test_permuted_through_products_and_sums():
    axis, other, heads = Axis(3), Axis(2), Axis(2)
    dim = Sum((Prod((heads, axis)), other, axis))
    order = torch.tensor([2, 0, 1])
    out = permuted(torch.arange(11), [dim], {axis: Order(order)})
    assert out.tolist() == [2, 0, 1, 5, 3, 4, 6, 7, 10, 8, 9]


@pytest.mark.parametrize("flipped", [False, True])
def test_blocks_in_the_same_and_in_another_dimension(flipped: bool):
    heads, axis, rest = Axis(2), Axis(3), Axis(4)
    order = Order(torch.tensor([[2, 0, 1], [0, 1, 2]]), heads)
    same = permuted(torch.arange(6), [Prod((heads, axis))], {axis: order})
    assert same.tolist() == [2, 0, 1, 3, 4, 5]
    w = torch.arange(24).view(8, 3)  # [heads x rest, axis]
    dims = [Prod((heads, rest)), axis]
    expected = torch.cat([w[:4, [2, 0, 1]], w[4:]])
    if flipped:
        w, dims, expected = w.T, dims[::-1], expected.T
    assert torch.equal(permuted(w, dims, {axis: order}), expected)


def test_an_ambiguous_block_is_none():
    heads, axis = Axis(2), Axis(3)
    found = [places(dim) for dim in (heads, Prod((heads, axis)))]
    place = next(p for p in found[1] if p.axis is axis)
    assert block_of(found, place, heads) is None
    assert block_of([[], found[1]], place, heads) is not None
    assert block_of([places(Sum((heads, UNIT))), [place]], place, axis) is None
