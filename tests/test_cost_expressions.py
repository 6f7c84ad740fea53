"""Costs in symbols, and from which batch on sparse wins."""

from dataclasses import replace
from math import prod

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sparsefx as sfx
from sparsefx import NM, Dense, Masked, Rule, Sampled, SparseConfig, cost
from sparsefx.passes import canonicalize, find_sites
from sparsefx.plan import Site
from sparsefx.testing import capture, plans, run_pass

SIZES = st.integers(1, 300)
M, N, K, B = sympy.symbols("M N K B", integer=True, positive=True)


def site(shape, role="forward", **changes):
    known = {"layer": "fc", "role": role, "kind": "mm", "op": "mm", "shape": shape}
    return Site(**{**known, "dtype": "float32", "device": "cpu", "group": 0, **changes})


def layer(m, n, k, **changes):
    shapes = {"forward": (m, n, k), "grad_input": (m, k, n), "grad_weight": (k, n, m)}
    return [site(shape, role, **changes) for role, shape in shapes.items()]


def conv(batch, inner, outer, image, taps=9):
    shapes = layer(batch * image**2, outer, inner * taps, kind="conv")
    return [replace(one, channels=(inner, outer, 1, batch)) for one in shapes]


# --- expressions


def test_a_layer_in_symbols():
    forward, grad_input, grad_weight = layer(M, 32, 64)
    found = cost.expressions(forward, Sampled(0.5))
    assert str(found.flops) == "64*M*Min(64, Max(1, share(ratio, 64)))"
    assert str(found.flops_dense) == "4096*M"
    assert cost.expressions(grad_input, Sampled(0.5), forward).flops == found.flops
    assert str(cost.expressions(grad_weight, Sampled(0.5)).flops) == (
        "4096*Min(M, Max(1, share(ratio, M)))"
    )
    masked = cost.expressions(site((M, 32, K)), NM(2, 4))
    assert str(masked.flops) == "floor(64*K*M*n/m)"
    assert str(masked.values) == "{n: 2, m: 4}"
    fixed = cost.expressions(site((8, 32, 64)), NM(2, 4))
    assert fixed.at(n=1) == {
        "flops_dense": 2 * 8 * 32 * 64,
        "flops": 8 * 32 * 64 // 2,
        "bytes_dense": 4 * (8 * 64 + 32 * 64 + 8 * 32),
        "bytes_moved": 4 * (8 * 64 + 32 * 16 + 8 * 32) + 32 * 16 // 4,
        "weight_bytes": 32 * 16 * 4 + 32 * 16 // 4,
    }


PATTERNS = st.one_of(
    st.builds(NM, st.integers(1, 3), st.integers(4, 32)),
    st.builds(
        Sampled,
        st.floats(0.01, 1),
        st.integers(1, 20),
        st.sampled_from(["topk", "topk_mean", "systematic", "bernoulli", "with_replacement"]),
    ),
    st.builds(Sampled, mass=st.floats(0.01, 1)),
    st.just(Masked()),
    st.just(Dense()),
)


@settings(max_examples=60)
@given(st.tuples(SIZES, SIZES, SIZES, st.integers(1, 4)), PATTERNS, st.floats(0, 1))
def test_symbols_replaced_by_sizes_are_the_integers(sizes, pattern, density):
    values = dict(zip((M, N, K, B), sizes, strict=True))
    for symbolic, fixed in zip(layer(M, N, K), layer(*sizes[:3]), strict=True):
        one = replace(symbolic, batch=B, kind="bmm", mask_density=density)
        same = replace(fixed, batch=sizes[3], kind="bmm", mask_density=density)
        found = cost.expressions(one, pattern)
        numbers = {**found.values, **values}
        assert int(found.flops_dense.subs(numbers)) == cost.dense_flops(same)
        assert int(found.flops.subs(numbers)) == cost.sparse_flops(same, pattern)
        assert int(found.weight_bytes.subs(numbers)) == cost.packed_weight_bytes(same, pattern)
        assert float(found.bytes_dense.subs(numbers)) == cost.dense_work(same).moved
        if isinstance(pattern, Sampled):
            moved = cost.sampled_work([same], pattern).moved
            assert float(found.bytes_moved.subs(numbers)) == pytest.approx(moved)


@settings(max_examples=60)
@given(st.tuples(*[st.integers(1, 12)] * 4), st.floats(0.01, 1))
def test_so_are_a_convolution_s(sizes, ratio):
    batch, inner, outer, image = sizes
    lead, *rest = conv(B, inner, outer, image)
    for one, same in zip([lead, *rest], conv(*sizes), strict=True):
        found = cost.expressions(one, Sampled(ratio), lead)
        flops = cost.sparse_flops(same, Sampled(ratio), conv(*sizes)[0])
        assert int(found.flops.subs({**found.values, B: batch})) == flops


def dynamic_sites(model, *shape):
    x = torch.randn(*shape, requires_grad=True)
    gm = capture(model, x, dynamic=True)
    run_pass(canonicalize, gm)
    run_pass(find_sites, gm)
    return [plan.site for plan in plans(gm)]


def test_sizes_of_a_dynamic_graph_are_its_hints():
    for one in dynamic_sites(nn.Linear(48, 24), 6, 48):
        found = cost.expressions(one, Sampled(0.3))
        assert len(found.values) == 2
        (batch,) = found.flops.free_symbols - {sympy.Symbol("ratio", positive=True)}
        assert found.values[batch] == 6
        now = found.at()
        assert now["flops"] == cost.sparse_flops(one, Sampled(0.3))
        assert found.at(**{str(batch): 12})["flops_dense"] == 2 * now["flops_dense"]
        assert found.at(ratio=1.0)["flops"] == now["flops_dense"] == 2 * prod((6, 48, 24))


# --- break-even


def wins(sites, pattern):
    pace = cost.pace_of(sites[0].kind, "cpu")
    dense = pace.time(cost.total(map(cost.dense_work, sites)))
    return pace.time(cost.sampled_work(sites, pattern)) <= cost.MARGIN * dense


def test_time_of_symbols_is_an_expression():
    work = cost.sampled_work(layer(M, 512, 512), Sampled(0.25))
    pace = cost.Pace(5.0, 50.0, 0.05, 10.0)
    same = cost.sampled_work(layer(70, 512, 512), Sampled(0.25))
    assert float(pace.time(work).subs(M, 70)) == pytest.approx(pace.time(same))


@settings(max_examples=60)
@given(st.integers(16, 1024), st.integers(16, 1024), st.sampled_from([0.1, 0.3, 0.5, 0.8]))
def test_it_is_the_smallest_number_of_rows(n, k, ratio):
    found = cost.break_even(layer(64, n, k), Sampled(ratio))
    assert (found.unit, found.here) == ("rows", 64)
    if found.start is None:
        assert not wins(layer(2**20, n, k), Sampled(ratio))
        return
    assert wins(layer(found.start, n, k), Sampled(ratio))
    assert wins(layer(4 * found.start, n, k), Sampled(ratio))
    assert found.start == 1 or not wins(layer(found.start - 1, n, k), Sampled(ratio))


def test_a_gradient_that_samples_the_batch_is_searched():
    gradient = layer(64, 512, 512)[2:]
    found = cost.break_even(gradient, Sampled(0.25))
    assert wins(layer(found.start, 512, 512)[2:], Sampled(0.25))
    assert not wins(layer(found.start - 1, 512, 512)[2:], Sampled(0.25))


def test_convolutions_and_batched_products_are_asked_for_their_batch():
    found = cost.break_even(conv(2, 16, 16, 8), Sampled(0.1))
    assert (found.unit, found.here) == ("batch", 2)
    assert wins(conv(found.start, 16, 16, 8), Sampled(0.1))
    assert not wins(conv(found.start - 1, 16, 16, 8), Sampled(0.1))
    batched = [replace(one, kind="bmm", batch=3) for one in layer(64, 64, 256)]
    assert str(cost.break_even(batched, Sampled(0.1))).startswith("sparse from batch ")


def test_what_can_not_be_said():
    assert cost.break_even(layer(M, N, 16), Sampled(0.5)) is None
    assert cost.break_even(layer(0, 16, 16), Sampled(0.5)) is None


def test_never_is_said():
    found = cost.break_even(layer(64, 16, 16), Sampled(0.9))
    assert (found.start, str(found)) == (None, "never sparse")


# --- what a report says


def test_a_dynamic_layer_says_its_batch_where_it_is_declined_and_where_not():
    model, x = nn.Linear(256, 256), torch.randn(8, 256, requires_grad=True)
    torch._dynamo.mark_dynamic(x, 0)
    texts = []
    for select in ("profitable", "all"):
        config = SparseConfig([Rule("*", Sampled(0.1))], False, select=select)
        texts.append(sfx.explain(model, config=config)(x).why()[0])
    start = cost.break_even(layer(8, 256, 256), Sampled(0.1)).start
    assert texts[0].startswith(
        f"addmm forward: dense: not profitable at batch 8: sparse from batch {start} on (all "
    )
    assert texts[1] == f"addmm forward: sampled 0.1 (sparse from batch {start} on)"
