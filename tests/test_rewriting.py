"""The one place that edits graphs: rules, what new nodes inherit, what a failing rule leads to."""

import pytest
import torch
from torch.nn import functional as F

from sparsefx import ops
from sparsefx.config import NM
from sparsefx.errors import PassError
from sparsefx.passes import rewrite_nm
from sparsefx.plan import Plan
from sparsefx.rewriting import (
    PLAN,
    SitesFailedError,
    Skip,
    copy_graph_module,
    emit,
    flip,
    operands,
    peel,
    plan_of,
    rewrite_nodes,
    value,
)
from sparsefx.testing import format_graph, traced
from sparsefx.verify import verify

aten = torch.ops.aten


def product():
    gm = traced(torch.mm, torch.randn(3, 8), torch.randn(8, 5))
    (node,) = (n for n in gm.graph.nodes if n.target is aten.mm.default)
    return gm, node


def doubled(mm):
    x, w = operands(mm, 2)
    return emit(mm, aten.mul.Tensor, emit(mm, aten.mm.default, x, w), 2)


def test_a_rule_s_node_takes_the_place_of_the_old_one():
    gm, mm = product()
    mm.meta["seq_nr"] = 7
    result = rewrite_nodes(gm, {aten.mm.default: doubled})
    assert (result.modified, result.skipped) == (True, {})
    x, w = torch.randn(3, 8), torch.randn(8, 5)
    torch.testing.assert_close(gm(x, w), 2 * (x @ w))
    new = next(n for n in gm.graph.nodes if n.target is aten.mul.Tensor)
    assert new.meta["seq_nr"] == 7
    assert new.meta["sparsefx_rule"] == "doubled"
    assert value(new).shape == (3, 5)


def test_a_skip_is_kept_with_its_reason():
    gm, mm = product()
    before = format_graph(gm)
    result = rewrite_nodes(gm, {aten.mm.default: lambda _: Skip("says the test")})
    assert (result.modified, result.skipped) == (False, {mm.name: "says the test"})
    assert format_graph(gm) == before


def test_none_and_excluded_nodes_are_left_alone():
    gm, mm = product()
    before = format_graph(gm)
    assert not rewrite_nodes(gm, {aten.mm.default: lambda _: None}).modified
    assert not rewrite_nodes(gm, {aten.mm.default: doubled}, excluded=[mm.name]).modified
    assert format_graph(gm) == before


def test_a_rule_that_raises_names_node_and_layer():
    gm = traced(F.linear, torch.randn(3, 8), torch.randn(4, 8), plan=NM(2, 4))

    def raising(node):
        raise ArithmeticError("no")

    with pytest.raises(SitesFailedError) as caught:
        rewrite_nodes(gm, {aten.mm.default: raising})
    (failure,) = caught.value.failures
    assert failure.error == "ArithmeticError: no"
    assert failure.layer == "mm"
    assert failure.group == 0
    assert "raising" in failure.detail
    assert str(caught.value).endswith("of layer 'mm': ArithmeticError: no")


def test_a_node_of_another_shape_or_dtype_is_refused():
    for other, message in [
        (lambda mm: emit(mm, aten.t.default, mm.args[0]), r"float32\(8, 3\) can't replace"),
        (
            lambda mm: emit(mm, aten._to_copy.default, mm, dtype=torch.float64),
            r"float64\(3, 5\) can't replace torch.float32\(3, 5\)",
        ),
    ]:
        gm, _ = product()
        with pytest.raises(SitesFailedError, match=message):
            rewrite_nodes(gm, {aten.mm.default: other})


def test_operands():
    _, mm = product()
    assert [n.op for n in operands(mm, 2)] == ["placeholder"] * 2
    with pytest.raises(TypeError, match="expected 3 tensor operands"):
        operands(mm, 3)


def test_transposes_are_seen_through_and_undone():
    _, mm = product()
    x = mm.args[0]
    once = flip(mm, x)
    assert value(once).shape == (8, 3)
    assert peel(once) == (x, True)
    assert flip(mm, once) is x
    twice = emit(mm, aten.permute.default, once, [-1, -2])
    assert peel(twice) == (x, False)
    view = emit(mm, aten.view.default, x, [8, 3])
    assert peel(view) == (view, False)


def test_copies_share_nothing_that_is_edited():
    gm = traced(F.linear, torch.randn(3, 8), torch.randn(4, 8), plan=NM(2, 4))
    before, copy = format_graph(gm), copy_graph_module(gm)
    assert [n.name for n in copy.graph.nodes] == [n.name for n in gm.graph.nodes]
    rewrite_nm(copy)
    assert format_graph(gm) == before
    assert format_graph(copy) != before
    assert sum(plan_of(n) is not None for n in gm.graph.nodes) == 1


def test_verify_finds_what_does_not_hold():
    gm = traced(torch.mm, torch.randn(3, 8), torch.randn(8, 5), plan=NM(2, 4))
    rewrite_nm(gm)
    verify(gm, "rewrite_nm")
    (node,) = (n for n in gm.graph.nodes if n.target is ops.nm_mm)
    kept = dict(node.meta)

    node.meta["val"] = value(node.args[0])
    with pytest.raises(PassError, match=r"after x: nm_mm\w* computes torch.float32\(3, 5\)"):
        verify(gm, "x")
    del node.meta["val"]
    with pytest.raises(PassError, match="has no fake value"):
        verify(gm, "x")
    node.meta = {**kept, PLAN: NM(2, 4)}
    with pytest.raises(PassError, match="instead of a Plan"):
        verify(gm, "x")
    node.meta = kept
    assert isinstance(plan_of(node), Plan)
    with gm.graph.inserting_before(node):
        late = gm.graph.call_function(aten.neg.default, (node.args[0],))
    late.meta = {"val": value(node.args[0]), "partitioner_tag": "is_backward"}
    node.args = (late, *node.args[1:])
    node.meta["partitioner_tag"] = "is_forward"
    with pytest.raises(PassError, match=f"forward node {node.name} reads backward node"):
        verify(gm, "x")
